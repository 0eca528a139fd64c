# SPDX-License-Identifier: Apache-2.0
# Finds the CUDA compiler and its static runtime, enables the language, and defines
#   flashcore::cudart      the headers and the static runtime
#   FLASHCORE_CUDA_FLAGS   for kernels: the architectures, one front-end pass for all of them
#   FLASHCORE_SM90_FLAGS   for the kernels that need Hopper's own instructions; empty without sm_90a
# In this order: FLASHCORE_CUDA_HOME (CMake or environment), CUDACXX, the toolkit from PyPI.
if(NOT FLASHCORE_CUDA_HOME)
  set(FLASHCORE_CUDA_HOME "$ENV{FLASHCORE_CUDA_HOME}")
endif()
if(FLASHCORE_CUDA_HOME)
  set(CMAKE_CUDA_COMPILER ${FLASHCORE_CUDA_HOME}/bin/nvcc)
elseif(NOT "$ENV{CUDACXX}" STREQUAL "" OR CMAKE_CUDA_COMPILER)
  if(NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER $ENV{CUDACXX})
  endif()
  # nvcc says where its toolkit is: what is called nvcc may be a script somewhere else.
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --dryrun -E -x cu /dev/null ERROR_VARIABLE dryrun OUTPUT_QUIET)
  if(NOT dryrun MATCHES "#\\$ TOP=([^\n]+)")
    message(FATAL_ERROR "CUDACXX: ${CMAKE_CUDA_COMPILER} does not say where its toolkit is.")
  endif()
  file(REAL_PATH ${CMAKE_MATCH_1} FLASHCORE_CUDA_HOME)
else()
  include(PyPI)
  flashcore_from_pypi(FLASHCORE_CUDA_HOME cuda-toolkit ROOT nvidia/cu13 ITEMS bin nvvm include lib/libcudart_static.a lib/libcudadevrt.a
    lib/libculibos.a)
  set(CMAKE_CUDA_COMPILER ${FLASHCORE_CUDA_HOME}/bin/nvcc)
endif()
if(NOT EXISTS ${CMAKE_CUDA_COMPILER})
  message(FATAL_ERROR "There is no CUDA compiler ${CMAKE_CUDA_COMPILER}. FLASHCORE_CUDA=OFF builds the CPU part alone.")
endif()

find_library(FLASHCORE_CUDART_STATIC cudart_static REQUIRED NO_CACHE NO_DEFAULT_PATH
  PATHS ${FLASHCORE_CUDA_HOME} PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib targets/sbsa-linux/lib)
cmake_path(GET FLASHCORE_CUDART_STATIC PARENT_PATH cuda_libraries)
# nvcc links a program while CMake makes its acquaintance, and does not look into PyPI's lib, which is not lib64.
set(ENV{LIBRARY_PATH} "${cuda_libraries}:$ENV{LIBRARY_PATH}")
set(CMAKE_CUDA_HOST_COMPILER ${CMAKE_CXX_COMPILER})
set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # flashcore::cudart is
set(CMAKE_CUDA_ARCHITECTURES OFF)  # FLASHCORE_CUDA_FLAGS says them
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  message(FATAL_ERROR "CUDA 12.8 or newer is needed; ${CMAKE_CUDA_COMPILER} is ${CMAKE_CUDA_COMPILER_VERSION}.")
endif()

add_library(flashcore::cudart STATIC IMPORTED GLOBAL)
set_target_properties(flashcore::cudart PROPERTIES IMPORTED_LOCATION ${FLASHCORE_CUDART_STATIC})
target_include_directories(flashcore::cudart SYSTEM INTERFACE ${FLASHCORE_CUDA_HOME}/include)
target_link_libraries(flashcore::cudart INTERFACE Threads::Threads ${CMAKE_DL_LIBS} rt)

# sm_80,sm_90,sm_90a,compute_80 -> -gencode=arch=compute_80,code=[sm_80,sm_90,compute_80] and, for the sm90 kernels, sm_90a.
string(REGEX REPLACE "[, ]+" ";" FLASHCORE_CUDA_ARCHS "${FLASHCORE_CUDA_ARCHS}")
set(kernel_flags --expt-relaxed-constexpr "SHELL:-Xfatbin -compress-all")
set(general_archs ${FLASHCORE_CUDA_ARCHS})
set(FLASHCORE_SM90_FLAGS)
if("sm_90a" IN_LIST FLASHCORE_CUDA_ARCHS)
  list(REMOVE_ITEM general_archs sm_90a)
  set(FLASHCORE_SM90_FLAGS "SHELL:-gencode arch=compute_90a,code=sm_90a" ${kernel_flags})
endif()
if(NOT general_archs)
  message(FATAL_ERROR "FLASHCORE_CUDA_ARCHS: 'sm_90a' needs 'sm_90' beside it: not every kernel is Hopper's own.")
endif()
set(numbers)
foreach(arch IN LISTS general_archs)
  if(NOT arch MATCHES "^(sm|compute)_([0-9]+)$")
    message(FATAL_ERROR "FLASHCORE_CUDA_ARCHS: '${arch}' is neither sm_<number> nor compute_<number>.")
  elseif(CMAKE_MATCH_2 LESS 80)
    message(FATAL_ERROR "FLASHCORE_CUDA_ARCHS: '${arch}' is too old: the kernels need compute capability 8.0 or newer.")
  endif()
  list(APPEND numbers ${CMAKE_MATCH_2})
endforeach()
list(SORT numbers COMPARE NATURAL)
list(GET numbers 0 oldest)
string(REPLACE ";" "," code "${general_archs}")
set(FLASHCORE_CUDA_FLAGS "SHELL:-gencode 'arch=compute_${oldest},code=[${code}]'" ${kernel_flags})

# The decode kernels' code for 9.0 is compiled as such: it uses programmatic dependent launch, which PTX of 8.0 does not have.
set(FLASHCORE_DECODE_FLAGS ${FLASHCORE_CUDA_FLAGS})
if("sm_90" IN_LIST general_archs AND oldest LESS 90)
  list(REMOVE_ITEM general_archs sm_90)
  string(REPLACE ";" "," code "${general_archs}")
  set(FLASHCORE_DECODE_FLAGS "SHELL:-gencode 'arch=compute_${oldest},code=[${code}]'"
    "SHELL:-gencode arch=compute_90,code=sm_90" ${kernel_flags})
endif()
