// SPDX-License-Identifier: Apache-2.0
// Shares of the work: every row and tile of units has one member, and the rows of a part of the
// batch lie together in scratch memory, a page from those of others. Exits non-zero on a fault.
#define GRU_FAST_ISA tested
#include "cpu/share.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace gru_fast;
using namespace gru_fast::tested;

namespace {

void expect(bool holds, const char* what, int members, int64_t G, int64_t B, int64_t tiles,
            bool dealt) {
  if (holds) return;
  std::fprintf(stderr, "%s: members %d, G %d, B %d, tiles %d, dealt %d\n", what, members,
               static_cast<int>(G), static_cast<int>(B), static_cast<int>(tiles), dealt);
  std::exit(1);
}

void check(int members, int64_t G, int64_t B, int64_t tiles, bool dealt) {
  constexpr int64_t kRowsOfRank = 3, kBytes = 320;
  auto holds = [&](bool so, const char* what) { expect(so, what, members, G, B, tiles, dealt); };
  const RowsApart apart(members, B, kRowsOfRank, kBytes);
  std::vector<int> done(G * B * tiles, 0);
  struct Block {
    int64_t begin, end;
    int part;
  };
  std::vector<Block> blocks;
  int64_t least = B, most = 0;  // ranks of a member that has any
  for (int member = 0; member < members; ++member) {
    const Share share = share_of(member, members, G, B, tiles, 64, false, dealt);
    share.each_tile(B, [&](int64_t g, int64_t i, int64_t tile) {
      ++done[(g * B + share.ranks[i]) * tiles + tile];
    });
    const int64_t first = apart.first(share), count = share.ranks.below(B) * kRowsOfRank;
    if (count > 0) {
      least = std::min(least, share.ranks.below(B));
      most = std::max(most, share.ranks.below(B));
    }
    if (count > 0) blocks.push_back({first, first + count, share.part});
  }
  holds(most <= least + 1, "members whose parts of the batch differ by more than a rank");
  holds(std::all_of(done.begin(), done.end(), [](int n) { return n == 1; }),
        "not every tile has one member");
  for (const Block& a : blocks) {
    holds(a.begin >= 0 && a.end <= apart.group, "rows beyond their group");
    for (const Block& b : blocks) {
      if (a.part == b.part) {
        holds(a.begin == b.begin && a.end == b.end, "a part in two places");
      } else if (a.begin <= b.begin) {
        holds((b.begin - a.end) * kBytes >= RowsApart::kPage, "parts less than a page apart");
      }
    }
  }
}

}  // namespace

int main() {
  for (int members = 1; members <= 7; ++members) {
    for (int64_t B = 1; B <= 70; ++B) {
      for (int64_t tiles : {1, 4, 33}) {
        for (bool dealt : {false, true}) {
          for (int64_t G : {1, 2, 5}) check(members, G, B, tiles, dealt);
        }
      }
    }
  }
  std::puts("ok");
  return 0;
}
