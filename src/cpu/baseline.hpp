// Every header that the kernel text uses and that is not the kernel text, included before an
// instruction set is switched on: an inline function compiled for AVX must not become the copy of it
// that the linker keeps for the whole program. For the same reason the kernel text stands in a
// namespace of the instruction set's name, HEED_ISA, which isa/*.hpp define.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>

#include "core/half.hpp"
#include "core/mask.hpp"
#include "core/philox.hpp"
#include "core/sequence.hpp"
#include "core/softmax_state.hpp"
#include "core/workspace.hpp"
#include "cpu/executor.hpp"
#include "cpu/schedule.hpp"
#include "cpu/task.hpp"
#include "registry.hpp"
