// The kernels of the forward pass, compiled for GPUs.
#include "cuda/launch.h"

namespace sparse_attn::cuda {

const char* attention_forward(const ForwardParams& params, Stream stream) {
  return forward(params, stream);
}

}  // namespace sparse_attn::cuda
