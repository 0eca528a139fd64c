# SPDX-License-Identifier: Apache-2.0
# Makes the source files of a machine's forward kernel, one for each tile of its tiles.inc (both element types in one file:
# reading CuTe costs more than compiling a kernel). Leaves their list in `out_sources`.
function(flashcore_kernel_instances machine out_sources)
  set(tiles_file ${PROJECT_SOURCE_DIR}/cpp/${machine}/tiles.inc)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${tiles_file})
  file(STRINGS ${tiles_file} tiles REGEX "^FLASHCORE_SM[0-9]+_TILE")
  set(sources)
  foreach(tile IN LISTS tiles)
    string(REGEX MATCH "\\((.*)\\)" _ "${tile}")
    set(TILE ${CMAKE_MATCH_1})
    set(MACHINE ${machine})
    string(REPLACE ", " "_" name "${TILE}")
    set(file ${CMAKE_CURRENT_BINARY_DIR}/${machine}/forward_${name}.cu)
    configure_file(${PROJECT_SOURCE_DIR}/cmake/instance.cu.in ${file} @ONLY)
    list(APPEND sources ${file})
  endforeach()
  set(${out_sources} ${sources} PARENT_SCOPE)
endfunction()
