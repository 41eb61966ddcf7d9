// What ops/wgmma.cuh declares. Its instructions have too many operands to be translated one by one.
//
// A product is done at once, or when it is waited for: by lot.
#pragma once
#include <functional>

#include "ptx.cuh"

namespace wgmma {

using emulation::self;

inline void begin() {}
inline void commit() { self->products.emplace_back(); }
template <int pending>
void wait() {
  while ((int)self->products.size() > pending + 1) {
    for (const auto& product : self->products.front()) product();
    self->products.erase(self->products.begin());
  }
}
template <int size>
void settle(float (&)[size]) {}

inline int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row % 8)) << 4); }

inline uint64_t descriptor(uint32_t shared, int tiles = 16) {
  if (shared % 1024) emulation::fail("a swizzled matrix that does not begin at a multiple of 1024 bytes");
  return shared >> 4 | (uint64_t)(tiles >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

// The element in a row of 128 bytes and, of those, a column; rows in tiles of 64 columns.
template <class Element>
float element(uint64_t matrix, int row, int column) {
  const uint32_t start = (matrix & 0x3fff) << 4, tiles = (matrix >> 16 & 0x3fff) << 4;
  const uint32_t address = start + column / 64 * tiles + row * 128 + column % 64 * 2;
  return ptx_instruction::element(*(const uint16_t*)ptx_instruction::at(address ^ (address >> 7 & 7) << 4), Element());
}

struct Rows {  // of a: the two that a thread has results of
  float at[2][16];
};

inline void under_way(std::function<void()> product) {
  const bool first = self->products.size() == 1 && self->products.back().empty();
  if (first && emulation::draw() % 2)
    product();
  else
    self->products.back().push_back(std::move(product));
}

template <class Element>
void multiply_transposed(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  under_way([&d, a, b, add, row = self->index.x % 128 / 32 * 16 + self->lane / 4, pair = self->lane % 4 * 2] {
    float rows[2][16];
    for (int k = 0; k < 16; k++)
      for (int half = 0; half < 2; half++) rows[half][k] = element<Element>(a, row + 8 * half, k);
    for (int i = 0; i < 64; i += 4)
      for (int j = 0; j < 2; j++) {
        float sums[2] = {};
        for (int k = 0; k < 16; k++) {
          const float x = element<Element>(b, i * 2 + pair + j, k);
          sums[0] += rows[0][k] * x, sums[1] += rows[1][k] * x;
        }
        for (int half = 0; half < 2; half++) d[i + 2 * half + j] = (add ? d[i + 2 * half + j] : 0) + sums[half];
      }
  });
}

template <class Element, int size>
void multiply_add(float (&d)[size], const uint32_t* a, uint64_t b) {
  struct Operand { uint32_t a[4]; };
  const auto rows = emulation::meet<Rows>("wgmma", ~0u, Operand{a[0], a[1], a[2], a[3]}, [](const Operand* const* operands, Rows* const* results) {
    for (int lane = 0; lane < emulation::LANES; lane++)
      for (int k = 0; k < 16; k++)
        for (int half = 0; half < 2; half++) {
          const uint32_t pair = operands[lane / 4 * 4 + k % 8 / 2]->a[k / 8 * 2 + half];
          results[lane]->at[half][k] = ptx_instruction::element(pair >> 16 * (k % 2), Element());
        }
  });
  under_way([&d, rows, b, pair = self->lane % 4 * 2] {
    for (int i = 0; i < size; i += 4)
      for (int j = 0; j < 2; j++)
        for (int k = 0; k < 16; k++) {
          const float x = element<Element>(b, k, i * 2 + pair + j);
          for (int half = 0; half < 2; half++) d[i + 2 * half + j] += rows.at[half][k] * x;
        }
  });
}

}  // namespace wgmma
