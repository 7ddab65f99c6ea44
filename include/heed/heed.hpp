// heed: exact softmax attention, forward and backward. This header is the whole public C++ API.
#pragma once

#include "heed/plan.hpp"
#include "heed/problem.hpp"
#include "heed/status.hpp"
#include "heed/tensor.hpp"
