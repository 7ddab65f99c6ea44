# Finds nvcc 12.8 or newer, switches CUDA on, and defines CUDA::cudart_static.
if(NOT "$ENV{CUDACXX}" STREQUAL "" AND NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER $ENV{CUDACXX} CACHE FILEPATH "nvcc" FORCE)
endif()
find_program(CMAKE_CUDA_COMPILER nvcc
  PATHS $ENV{CUDA_PATH}/bin /usr/local/cuda/bin ${PROJECT_SOURCE_DIR}/.venv/cuda/nvidia/cu13/bin)
set(ask "set CUDACXX, run scripts/setup_cuda.sh, which gets one without installing CUDA, or build with -DHEED_CUDA=OFF")
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "HEED_CUDA needs nvcc 12.8 or newer, and there is none: ${ask}")
endif()
execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE said ERROR_QUIET)
string(REGEX MATCH "release ([0-9.]+)" said "${said}")
if(NOT said OR CMAKE_MATCH_1 VERSION_LESS 12.8)
  set(nvcc ${CMAKE_CUDA_COMPILER})
  unset(CMAKE_CUDA_COMPILER CACHE)  # another one may be found next time
  message(FATAL_ERROR "HEED_CUDA needs nvcc 12.8 or newer, and ${nvcc} says '${said}': ${ask}")
endif()
# One host compiler for all files; CUDAHOSTCXX and -DCMAKE_CUDA_HOST_COMPILER still choose.
if(NOT CMAKE_CUDA_HOST_COMPILER AND NOT DEFINED ENV{CUDAHOSTCXX})
  set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
endif()
# CMake 3.25 does not know this flag of nvcc 13.
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
set(CMAKE_CUDA_ARCHITECTURES OFF)
enable_language(CUDA)
find_package(CUDAToolkit 12.8 REQUIRED)
