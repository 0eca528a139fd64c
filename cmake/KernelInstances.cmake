# SPDX-License-Identifier: Apache-2.0
# Makes the source files of a machine's kernel, one for each line of a list of tiles in cpp/<machine> (both element types in one
# file: reading CuTe costs more than compiling a kernel). `kernel` is "forward", from tiles.inc, or another one ("decode",
# "small"), from <kernel>_tiles.inc; cmake/<kernel>_instance.cu.in is the file's form. Leaves their list in `out_sources`.
function(flashcore_kernel_instances machine kernel out_sources)
  set(tiles_file ${PROJECT_SOURCE_DIR}/cpp/${machine}/tiles.inc)
  if(NOT kernel STREQUAL forward)
    set(tiles_file ${PROJECT_SOURCE_DIR}/cpp/${machine}/${kernel}_tiles.inc)
  endif()
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${tiles_file})
  file(STRINGS ${tiles_file} tiles REGEX "^FLASHCORE_SM[0-9]+_")
  set(sources)
  foreach(tile IN LISTS tiles)
    string(REGEX MATCH "\\((.*)\\)" _ "${tile}")
    set(TILE ${CMAKE_MATCH_1})
    set(MACHINE ${machine})
    string(REPLACE ", " "_" name "${TILE}")
    set(file ${CMAKE_CURRENT_BINARY_DIR}/${machine}/${kernel}_${name}.cu)
    configure_file(${PROJECT_SOURCE_DIR}/cmake/${kernel}_instance.cu.in ${file} @ONLY)
    list(APPEND sources ${file})
  endforeach()
  set(${out_sources} ${sources} PARENT_SCOPE)
endfunction()
