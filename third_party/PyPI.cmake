# SPDX-License-Identifier: Apache-2.0
# Takes an outside part from the Python package that carries it, in the version that pyproject.toml pins.
#
# pip's isolated environments have a new path and new file times for every build, which would make everything compile
# again. So the part is copied once into ${FLASHCORE_CACHE} (or $XDG_CACHE_HOME/flashcore, or ~/.cache/flashcore) and used
# from there. A copy and no links: compilers resolve links, and see the times behind them.

# Sets `out` to the version that pyproject.toml pins `package` to.
function(flashcore_pinned_version package out)
  set(pyproject ${PROJECT_SOURCE_DIR}/pyproject.toml)
  set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${pyproject})
  file(STRINGS ${pyproject} line REGEX "\"${package}(\\[[a-z,]*\\])?==")
  if(NOT line MATCHES "==([0-9a-z.]+)")
    message(FATAL_ERROR "pyproject.toml pins no version of ${package}")
  endif()
  set(${out} ${CMAKE_MATCH_1} PARENT_SCOPE)
endfunction()

# Sets `out` to a folder that holds the files and folders ITEMS, found below folder ROOT of `package`.
function(flashcore_from_pypi out package)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "ROOT" "ITEMS")
  flashcore_pinned_version(${package} version)
  foreach(folder "$ENV{FLASHCORE_CACHE}" "$ENV{XDG_CACHE_HOME}/flashcore" "$ENV{HOME}/.cache/flashcore" "$ENV{LOCALAPPDATA}/flashcore")
    if(IS_ABSOLUTE "${folder}" AND NOT folder MATCHES "^/(\\.cache/)?flashcore$")
      cmake_path(SET cache NORMALIZE "${folder}/${package}-${version}")
      break()
    endif()
  endforeach()
  if(cache AND EXISTS ${cache})
    set(${out} ${cache} PARENT_SCOPE)
    return()
  endif()

  find_package(Python 3.10 QUIET COMPONENTS Interpreter)
  if(Python_EXECUTABLE)
    execute_process(COMMAND ${Python_EXECUTABLE} -c
      "from importlib.metadata import distribution as d; p = d('${package}'); print(p.version, p.locate_file('${arg_ROOT}'), sep='\\n', end='')"
      OUTPUT_VARIABLE found ERROR_VARIABLE reason RESULT_VARIABLE result)
  else()
    set(result "there is no Python 3.10 or newer")
  endif()
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${package} ${version} is needed and not to be found by '${Python_EXECUTABLE}'. "
      "Run '${Python_EXECUTABLE} -m pip install ${package}==${version}' (with the extras that pyproject.toml gives it), or "
      "point at another copy: third_party/README.md says how.\n${result} ${reason}")
  endif()
  string(REGEX REPLACE "^[^\n]*\n" "" root "${found}")
  string(REGEX MATCH "^[^\n]*" found_version "${found}")
  if(NOT found_version STREQUAL version)
    message(FATAL_ERROR "${package} ${version} is needed, '${Python_EXECUTABLE}' has ${found_version}.")
  endif()
  if(NOT cache)
    set(${out} ${root} PARENT_SCOPE)
    return()
  endif()

  # Copied beside its place and then renamed, so that nobody ever sees half of it, whoever else builds at the same time.
  string(RANDOM LENGTH 8 suffix)
  set(partial ${cache}.${suffix})
  foreach(item IN LISTS arg_ITEMS)
    cmake_path(GET item PARENT_PATH parent)
    if(IS_DIRECTORY ${root}/${item})
      set(command copy_directory ${root}/${item} ${partial}/${item})
    else()
      set(command copy ${root}/${item} ${partial}/${item})
    endif()
    execute_process(COMMAND ${CMAKE_COMMAND} -E make_directory ${partial}/${parent} RESULT_VARIABLE result ERROR_VARIABLE reason)
    if(result EQUAL 0)
      execute_process(COMMAND ${CMAKE_COMMAND} -E ${command} RESULT_VARIABLE result ERROR_VARIABLE reason)
    endif()
    if(NOT result EQUAL 0)
      break()
    endif()
  endforeach()
  if(result EQUAL 0)
    file(RENAME ${partial} ${cache} RESULT result)
  endif()
  if(EXISTS ${partial})
    file(REMOVE_RECURSE ${partial})
  endif()
  if(EXISTS ${cache})
    set(${out} ${cache} PARENT_SCOPE)
  else()
    message(WARNING "${package} cannot be kept in ${cache} (${reason}); the next build may compile everything again. "
      "FLASHCORE_CACHE names another folder.")
    set(${out} ${root} PARENT_SCOPE)
  endif()
endfunction()
