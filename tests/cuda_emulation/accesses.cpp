// Accesses to shared and global memory: bounds, races, and copies that land late.
#include <string>

#include "emulator.h"

namespace emulator {

namespace {

std::string at(uint32_t address) { return " at shared byte " + std::to_string(address); }

std::string by(int warp, const Site& site) {
  return "warp " + std::to_string(warp) + " in " + describe(site);
}

// ldmatrix reads for other lanes, too: even what a lane itself wrote needs a barrier.
bool happens_before(int thread, uint32_t time, bool by_all_lanes) {
  if (!by_all_lanes && thread == current->index) return true;
  return time < current->known[thread / kWarpSize];
}

void check_reads(uint32_t granule, Site site) {
  Reads* reads = &block->reads[granule * block->num_warps];
  for (int warp = 0; warp < block->num_warps; ++warp) {
    if (reads[warp].time == 0) continue;
    const bool by_all = reads[warp].lane == kAllLanes;
    const int reader = warp * kWarpSize + (by_all ? 0 : reads[warp].lane);
    if (!happens_before(reader, reads[warp].time, by_all)) {
      fail("race: overwrites what " + by(warp, reads[warp].site) + " may still read" +
               at(granule * kGranule),
           site);
    }
    reads[warp].time = 0;
  }
}

void check_write(uint32_t granule, Site site) {
  const Granule& g = block->granules[granule];
  if (g.is_pending) fail("overwrites a copy that has not landed" + at(granule * kGranule), site);
  if (g.writer != 0 && !happens_before(g.writer - 1, g.write_time, false)) {
    fail("race: overwrites what " + by((g.writer - 1) / kWarpSize, g.site) + " wrote" +
             at(granule * kGranule),
         site);
  }
  check_reads(granule, site);
}

void mark_written(uint32_t granule, int byte_mask, Site site) {
  Granule& g = block->granules[granule];
  g.is_pending = false;
  g.writer = static_cast<uint16_t>(current->index + 1);
  g.write_time = block->clock[current->warp];
  g.written |= static_cast<uint8_t>(byte_mask);
  g.site = site;
}

void check_read(uint32_t granule, int byte_mask, bool by_all_lanes, Site site) {
  const Granule& g = block->granules[granule];
  if (g.is_pending) fail("reads a copy that has not landed" + at(granule * kGranule), site);
  if ((g.written & byte_mask) != byte_mask) {
    fail("reads what nobody wrote" + at(granule * kGranule), site);
  }
  if (!happens_before(g.writer - 1, g.write_time, by_all_lanes)) {
    fail("race: reads what " + by((g.writer - 1) / kWarpSize, g.site) + " wrote" +
             at(granule * kGranule),
         site);
  }
  Reads& reads = block->reads[granule * block->num_warps + current->warp];
  // An earlier reader of the warp is remembered until a barrier has covered it.
  const bool is_one_of_several =
      reads.time != 0 && reads.lane != current->lane && reads.time >= current->known[current->warp];
  reads = {block->clock[current->warp],
           by_all_lanes || is_one_of_several ? kAllLanes : current->lane, site};
}

void land(const Copy& copy, Site site) {
  uint8_t* target = block->shared.data() + copy.target;
  if (copy.source == nullptr) {
    std::memset(target, 0, kCopyBytes);
  } else {
    std::memcpy(target, copy.source, kCopyBytes);
  }
  if (!block->options->checks_races) return;
  for (uint32_t g = copy.target / kGranule; g < (copy.target + kCopyBytes) / kGranule; ++g) {
    mark_written(g, 15, site);
  }
}

}  // namespace

void* shared_access(uint32_t address, int bytes, bool writes, bool by_all_lanes, Site site) {
  step(site);
  address += static_cast<uint32_t>(shift_of(site));
  if (address + uint64_t(bytes) > block->shared.size()) fail("out of bounds" + at(address), site);
  if (address % bytes != 0) fail("misaligned" + at(address), site);
  if (block->options->checks_races) {
    const int mask = bytes >= kGranule ? 15 : ((1 << bytes) - 1) << address % kGranule;
    for (uint32_t g = address / kGranule; g <= (address + bytes - 1) / kGranule; ++g) {
      if (writes) {
        check_write(g, site);
        mark_written(g, mask, site);
      } else {
        check_read(g, mask, by_all_lanes, site);
      }
    }
  }
  return block->shared.data() + address;
}

const void* global_access(const void* data, int bytes, bool writes, Site site) {
  step(site);
  data = static_cast<const char*>(data) + shift_of(site);
  if (reinterpret_cast<uintptr_t>(data) % bytes != 0) fail("misaligned in global memory", site);
  if (const char* why = block->memory->refusal_of(data, bytes, writes, block->index)) {
    fail(why, site);
  }
  return data;
}

void copy_async(uint32_t target, const void* source, bool valid, Site site) {
  if (is_skipped(site)) return;
  if (target + uint64_t{kCopyBytes} > block->shared.size())
    fail("out of bounds" + at(target), site);
  if (target % kCopyBytes != 0) fail("misaligned" + at(target), site);
  if (valid) source = global_access(source, kCopyBytes, false, site);
  if (block->options->checks_races) {
    for (uint32_t g = target / kGranule; g < (target + kCopyBytes) / kGranule; ++g) {
      check_write(g, site);
      block->granules[g].is_pending = true;
    }
  }
  current->copies.push_back({target, valid ? source : nullptr, current->groups});
}

void commit(Site site) {
  if (!is_skipped(site)) ++current->groups;
}

void wait(int groups_left, Site site) {
  if (is_skipped(site)) return;
  std::erase_if(current->copies, [&](const Copy& copy) {
    if (copy.group >= current->groups - groups_left) return false;
    land(copy, site);
    return true;
  });
}

void Memory::add(const void* data, size_t bytes, bool is_writable) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (bytes > 0) ranges_.push_back({begin, begin + bytes, is_writable, {}});
}

void Memory::begin_launch() {
  for (Range& range : ranges_) {
    if (range.is_writable) range.writers.assign((range.end - range.begin + 1) / 2, 0);
  }
}

const char* Memory::refusal_of(const void* data, size_t bytes, bool writes, int block) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  for (size_t tries = 0; tries < ranges_.size(); ++tries, last_ = (last_ + 1) % ranges_.size()) {
    Range& range = ranges_[last_];
    if (begin < range.begin || begin + bytes > range.end) continue;
    if (!range.is_writable) return writes ? "writes read-only global memory" : nullptr;
    const size_t first = (begin - range.begin) / 2, end = (begin + bytes - range.begin + 1) / 2;
    for (size_t i = first; i < end; ++i) {
      if (range.writers[i] != 0 && range.writers[i] != block + 1) {
        return "touches what another block wrote";
      }
      if (writes) range.writers[i] = block + 1;
    }
    return nullptr;
  }
  return "out of bounds of global memory";
}

}  // namespace emulator
