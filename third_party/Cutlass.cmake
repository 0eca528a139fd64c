# SPDX-License-Identifier: Apache-2.0
# Finds the headers of CUTLASS and CuTe and defines flashcore::cutlass.
# In this order: FLASHCORE_CUTLASS_DIR (CMake or environment; a folder that has include/cute), the package from PyPI.
if(NOT FLASHCORE_CUTLASS_DIR)
  set(FLASHCORE_CUTLASS_DIR "$ENV{FLASHCORE_CUTLASS_DIR}")
endif()
if(NOT FLASHCORE_CUTLASS_DIR)
  include(PyPI)
  flashcore_from_pypi(FLASHCORE_CUTLASS_DIR nvidia-cutlass ROOT cutlass_library/source ITEMS include)
endif()
if(NOT EXISTS ${FLASHCORE_CUTLASS_DIR}/include/cute/tensor.hpp)
  message(FATAL_ERROR "There is no include/cute/tensor.hpp in ${FLASHCORE_CUTLASS_DIR}.")
endif()
add_library(flashcore::cutlass INTERFACE IMPORTED GLOBAL)
target_include_directories(flashcore::cutlass SYSTEM INTERFACE ${FLASHCORE_CUTLASS_DIR}/include)
