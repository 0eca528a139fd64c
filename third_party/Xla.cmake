# SPDX-License-Identifier: Apache-2.0
# Finds the headers of XLA's foreign function interface and defines flashcore::xla.
# In this order: FLASHCORE_XLA_DIR (CMake or environment; a folder that has include/xla), the package jaxlib from PyPI: the
# oldest that flashcore.jax supports, since XLA refuses handlers built against a newer interface than its own.
if(NOT FLASHCORE_XLA_DIR)
  set(FLASHCORE_XLA_DIR "$ENV{FLASHCORE_XLA_DIR}")
endif()
if(NOT FLASHCORE_XLA_DIR)
  include(PyPI)
  flashcore_from_pypi(FLASHCORE_XLA_DIR jaxlib ROOT jaxlib ITEMS include/xla)
endif()
if(NOT EXISTS ${FLASHCORE_XLA_DIR}/include/xla/ffi/api/ffi.h)
  message(FATAL_ERROR "There is no include/xla/ffi/api/ffi.h in ${FLASHCORE_XLA_DIR}.")
endif()
add_library(flashcore::xla INTERFACE IMPORTED GLOBAL)
target_include_directories(flashcore::xla SYSTEM INTERFACE ${FLASHCORE_XLA_DIR}/include)
