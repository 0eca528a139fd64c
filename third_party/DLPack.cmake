# SPDX-License-Identifier: Apache-2.0
# Finds the header of DLPack (version 1.3 or newer, which has the C exchange API) and defines flashcore::dlpack.
# In this order: FLASHCORE_DLPACK_DIR (CMake or environment; a folder that has include/dlpack), the package from PyPI.
if(NOT FLASHCORE_DLPACK_DIR)
  set(FLASHCORE_DLPACK_DIR "$ENV{FLASHCORE_DLPACK_DIR}")
endif()
if(NOT FLASHCORE_DLPACK_DIR)
  include(PyPI)
  flashcore_from_pypi(FLASHCORE_DLPACK_DIR apache-tvm-ffi ROOT tvm_ffi ITEMS include/dlpack)
endif()
if(NOT EXISTS ${FLASHCORE_DLPACK_DIR}/include/dlpack/dlpack.h)
  message(FATAL_ERROR "There is no include/dlpack/dlpack.h in ${FLASHCORE_DLPACK_DIR}.")
endif()
add_library(flashcore::dlpack INTERFACE IMPORTED GLOBAL)
target_include_directories(flashcore::dlpack SYSTEM INTERFACE ${FLASHCORE_DLPACK_DIR}/include)
