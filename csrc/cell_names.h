// SPDX-License-Identifier: Apache-2.0
// The names that Python gives the cells.
#pragma once
#include <string_view>

#include "cpu/problem.h"

namespace gru_fast {

struct CellName {
  std::string_view name;
  Cell cell;
};
inline constexpr CellName kCellNames[] = {{"reset_after", Cell::kResetAfter},
                                          {"reset_before", Cell::kResetBefore},
                                          {"no_reset", Cell::kNoReset}};
inline constexpr const char* kExpectedCells = "'reset_after', 'reset_before' or 'no_reset'";

// False, with `cell` as it was, if there is no such cell.
inline bool find_cell(std::string_view name, Cell& cell) {
  for (const CellName& known : kCellNames) {
    if (known.name == name) {
      cell = known.cell;
      return true;
    }
  }
  return false;
}

}  // namespace gru_fast
