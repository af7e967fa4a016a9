// Which keys of a tile of keys the rows of a query tile see. Unlike KeyCursor this answers for any
// pair of tiles, and a query tile may span several rows of the index lists.
#pragma once

#include "cpu/layout/granule.h"
#include "cpu/layout/rules.h"

namespace sparse_attn::cpu {

inline constexpr int kKeyTileGranules = 8;
inline constexpr int64_t kKeyTile = kKeyTileGranules * kGranule;

// The granules of one key tile that a query tile sees.
struct Visibility {
  struct Part {
    int granule = 0;
    const uint32_t* visible = nullptr;  // as in Granule
    RowRange rows = {};
  };
  int count = 0;
  Part parts[kKeyTileGranules];
  uint32_t words[kKeyTileGranules][kMaxRows];  // 0 for rows after the last
};

// Sets bit t for each key tile t of which the query tile may see keys.
void mark_key_tiles(const AttentionParams& params, const TileIndex& tile, uint64_t* bits);

// Fills `found` for the query tile and the key tile that begins at `first_key`.
void find_visibility(const AttentionParams& params, const TileIndex& tile, int64_t first_key,
                     Visibility& found);

// Which rows of the tile see any key.
void find_busy_rows(const AttentionParams& params, const TileIndex& tile, bool* busy);

}  // namespace sparse_attn::cpu
