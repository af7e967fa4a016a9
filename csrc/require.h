// Refusals of what callers pass.
#pragma once

#include <sstream>
#include <stdexcept>

namespace sparse_attn {

// Throws std::invalid_argument with the parts of the message, one after the other.
template <class... Parts>
void require(bool condition, const Parts&... message) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}

}  // namespace sparse_attn
