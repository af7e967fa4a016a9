// Which keys a query tile sees, handed out as packed granules of 32.
#pragma once

#include "cpu/kernels/tile_kernel.h"
#include "cpu/layout/candidates.h"

namespace sparse_attn::cpu {

// The keys of one KV head: raw rows, and the granules that the call packed beforehand, from the
// first on.
struct KeySource {
  const std::byte* k = nullptr;
  const std::byte* v = nullptr;
  int64_t packed_granules = 0;
  const std::byte* packed_k = nullptr;
  const std::byte* packed_v = nullptr;
};

// An upper estimate of how many keys the tile looks at.
int64_t candidate_estimate(const AttentionParams& params, const TileIndex& tile);

// Walks the union of sink, window, blocks and columns in ascending order of 32-key granules.
// A granule all of whose keys are candidates is used as it lies in memory, and for in-place kernels
// so is a run of them; other candidates are gathered, so a key that no row of the tile sees is
// never touched.
class KeyCursor {
 public:
  KeyCursor(const AttentionParams& params, const TileKernel& kernel, const TileIndex& tile,
            const KeySource& source, std::byte* scratch);

  static int64_t scratch_bytes(const AttentionParams& params, const TileKernel& kernel);

  // Fills up to kernel.granules_per_step granules, valid until the next call but one; 0 at the end.
  int next(Granule* granules);

  // Whether granules have terms.
  bool is_biased() const { return params_.is_biased(); }

 private:
  bool is_run(const Candidates& found) const;
  Granule packed_granule(const std::byte* k, const std::byte* v, int count) const;
  bool has_packed_halves(const int32_t* positions, int count) const;
  Granule join_halves(const int32_t* positions, std::byte* k, std::byte* v) const;
  Granule use_run(const Candidates& found, int slot);
  Granule use_gathered(int count, int slot);
  Granule pack(const int32_t* positions, int count, int slot);
  void mask_rows(Granule& granule, const int32_t* positions, uint32_t always, uint32_t window,
                 int slot);
  void add_terms(Granule& granule, const int32_t* positions, int slot);

  const AttentionParams& params_;
  const TileKernel& kernel_;
  KeySource source_;
  CandidateWalk walk_;
  HeadBias bias_;

  // Candidates of partly listed granules that wait for company.
  int32_t pending_[2 * kGranule];
  uint64_t pending_always_ = 0;
  int num_pending_ = 0;

  int64_t k_bytes_, v_bytes_;
  int first_slot_ = 0;  // of the two sets of slots in scratch memory, the one in use
  std::byte* packed_scratch_;
  uint32_t* mask_scratch_;
  KeyTerms<kGranule>* term_scratch_;
};

}  // namespace sparse_attn::cpu
