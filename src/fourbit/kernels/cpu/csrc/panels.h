// Operands [groups, rows, spots, sums] whose tiles have scales, walked in panels: lines of numbers that lie next to each other, along
// the sums, or along the rows ("turned": then a tile, and a rotation, run from line to line). A panel holds whole tiles and whole blocks
// of a rotation.
#pragma once

#include "numbers.h"

namespace fourbit {
namespace FOURBIT_ISA {
namespace {

constexpr int kMostLines = 128, kMostWidth = 1024, kMostNumbers = 8192, kMostTiles = 1024;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

struct Place {
  int64_t group, spot, line, column;  // of the first number
  int lines, columns;                 // that exist; columns of a panel are `width`, those behind are zero
};

struct Panels {
  const Tiles* t;
  int lines, width, tile_lines, tile_columns;
  int64_t num_lines, num_columns, down, across, count;
  int64_t of_tile_group, of_tile_spot, of_tile_line, of_tile_column;  // steps between the scales of tiles

  explicit Panels(const Tiles* t) : t(t) {
    const bool turned = t->turned;
    tile_lines = turned ? t->tile_sums : t->tile_rows;
    tile_columns = turned ? t->tile_rows : t->tile_sums;
    num_lines = turned ? t->sums : t->rows;
    num_columns = turned ? t->rows : t->sums;
    lines = turned ? max_of(tile_lines, t->rotation) : tile_lines;
    const int64_t whole = (num_columns + kBlock - 1) / kBlock * kBlock;
    int most = turned || lines > 1 ? min_of(4096 / lines, kMostWidth) : kMostWidth;
    most = max_of(most, max_of(64, turned ? tile_columns : max_of(tile_columns, t->rotation)));
    width = whole < most ? static_cast<int>(whole) : most;
    const int unit = turned ? tile_columns : max_of(tile_columns, t->rotation);
    if (width % unit) width += unit - width % unit;
    down = (num_lines + lines - 1) / lines;
    across = (num_columns + width - 1) / width;
    count = t->groups * t->spots * down * across;
    const int64_t of_sums = (t->sums + t->tile_sums - 1) / t->tile_sums, of_rows = (t->rows + t->tile_rows - 1) / t->tile_rows;
    of_tile_spot = of_sums;
    of_tile_line = turned ? 1 : t->spots * of_sums;
    of_tile_column = turned ? t->spots * of_sums : 1;
    of_tile_group = of_rows * t->spots * of_sums;
  }

  Place at(int64_t panel) const {
    Place p;
    p.column = panel % across * width;
    panel /= across;
    p.spot = panel % t->spots;
    panel /= t->spots;
    p.line = panel % down * lines;
    p.group = panel / down;
    p.lines = static_cast<int>(num_lines - p.line < lines ? num_lines - p.line : lines);
    p.columns = static_cast<int>(num_columns - p.column < width ? num_columns - p.column : width);
    return p;
  }

  int64_t first_tile(const Place& p) const {
    return p.group * of_tile_group + p.spot * of_tile_spot + p.line / tile_lines * of_tile_line +
           p.column / tile_columns * of_tile_column;
  }

  int tile_rows_of(const Place& p) const { return (p.lines + tile_lines - 1) / tile_lines; }
  int tiles() const { return lines / tile_lines * tiles_across(); }
  int tiles_across() const { return width / tile_columns; }
};

// What a panel needs while it is worked on.
struct Work {
  alignas(64) float numbers[kMostNumbers];
  alignas(64) float squares[kMostNumbers];
  const float* line[kMostLines];
  alignas(64) float amax[kMostTiles], block[kMostTiles], inverse[kMostTiles], whole[kMostTiles], statistic[kMostTiles];
  alignas(64) float error[2][kMostTiles], other_block[kMostTiles], other_inverse[kMostTiles];
  alignas(64) float words[2][kMostWidth];
  alignas(64) float signs[2 * 128];
};

}  // namespace
}  // namespace FOURBIT_ISA
}  // namespace fourbit
