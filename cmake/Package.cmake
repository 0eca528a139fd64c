# SPDX-License-Identifier: Apache-2.0
# The CMake package, so that a C++ program can find_package(flashcore): library, headers, and the CUDA runtime that the
# library needs, so that the program's machine needs no toolkit. A component of its own, never part of the wheel:
#   cmake --install <build folder> --prefix <where> --component development
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flashcore)
install(TARGETS flashcore EXPORT flashcore ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY cpp/include/flashcore DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT development)
install(EXPORT flashcore NAMESPACE flashcore:: FILE flashcore-targets.cmake DESTINATION ${package_dir} COMPONENT development)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/flashcore COMPONENT development)
install(DIRECTORY third_party/licenses/ DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/flashcore COMPONENT development)
if(FLASHCORE_CUDA)
  install(FILES ${FLASHCORE_CUDART_STATIC} DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development)
  cmake_path(GET FLASHCORE_CUDART_STATIC FILENAME cudart_file)
endif()
configure_package_config_file(cmake/flashcore-config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/flashcore-config.cmake
  INSTALL_DESTINATION ${package_dir} PATH_VARS CMAKE_INSTALL_LIBDIR)
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/flashcore-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/flashcore-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/flashcore-config-version.cmake
  DESTINATION ${package_dir} COMPONENT development)
