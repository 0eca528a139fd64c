# SPDX-License-Identifier: Apache-2.0
# Finds nanobind, which makes the Python module.
# In this order: FLASHCORE_NANOBIND_DIR (CMake or environment; the folder of the Python package), the package from PyPI.
if(NOT FLASHCORE_NANOBIND_DIR)
  set(FLASHCORE_NANOBIND_DIR "$ENV{FLASHCORE_NANOBIND_DIR}")
endif()
if(NOT FLASHCORE_NANOBIND_DIR)
  include(PyPI)
  flashcore_from_pypi(FLASHCORE_NANOBIND_DIR nanobind ROOT nanobind ITEMS cmake ext include src stubgen.py)
endif()
include(${FLASHCORE_NANOBIND_DIR}/cmake/nanobind-config.cmake)
