// AVX-512 with AMX: a tile is 16 rows of 64 bytes, and one instruction multiplies two of bf16 into
// a third of f32. Everything after this header is compiled for it, up to isa/end.hpp.
#pragma once

#include <cstdint>

#define HEED_ISA amx_bf16
#include "cpu/isa/avx512_bf16.hpp"

#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                                      \
    __attribute__((                                                                                \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16"))), \
    apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16")
#endif

namespace heed::cpu::inline HEED_ISA {

struct AmxBf16 : Avx512Bf16 {
  static constexpr Arch kArch = Arch::amx_bf16;
  // 2 x 2 tiles of sums, 2 + 2 of operands: a load for every multiplication.
  static constexpr int kMicroRows = 32;
  static constexpr int kTileRows = 16;
  static constexpr int kTileWords = 16;  // words of a row, of two bf16 or one f32

  // The calling thread's eight tiles, for a scope; tiles 3 to 5 have `rows` rows.
  class Tiles {
   public:
    explicit Tiles(int rows = kTileRows) {
      Configuration all;
      for (int tile = 0; tile < 8; ++tile) {
        all.row_bytes[tile] = kTileWords * 4;
        all.rows[tile] = static_cast<std::uint8_t>(3 <= tile && tile <= 5 ? rows : kTileRows);
      }
      asm volatile("ldtilecfg %0" : : "m"(all));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

   private:
    struct alignas(64) Configuration {
      std::uint8_t palette = 1;
      std::uint8_t start_row = 0;
      std::uint8_t reserved[14] = {};
      std::uint16_t row_bytes[16] = {};
      std::uint8_t rows[16] = {};
    };
  };

  template <int kTile>
  [[gnu::always_inline]] static void zero_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // `stride`: words from row to row.
  template <int kTile>
  [[gnu::always_inline]] static void load_tile(const void* p, std::int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0"
                 :
                 : "i"(kTile), "r"(p), "r"(stride * 4)
                 : "memory");
  }
  template <int kTile>
  [[gnu::always_inline]] static void store_tile(float* p, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)"
                 :
                 : "i"(kTile), "r"(p), "r"(stride * 4)
                 : "memory");
  }
  // C[row][column] += A[row][word] . B[word][column], 16 words deep; subnormal numbers count as
  // zero.
  template <int kC, int kA, int kB>
  [[gnu::always_inline]] static void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }
};

}  // namespace heed::cpu::inline HEED_ISA
