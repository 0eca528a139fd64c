# SPDX-License-Identifier: Apache-2.0
# The build that scikit-build-core runs. It wipes its own build folder whenever pip's isolated environment has a new path,
# which is every time; so everything is compiled in a CMake build nested in that folder, which it does not know of, and an
# install of unchanged sources compiles nothing.

# One folder for each choice that CMake cannot change in a configured build.
set(choices "$ENV{FLASHCORE_CUDA};$ENV{FLASHCORE_CUDA_HOME};$ENV{CUDACXX};$ENV{CXX};${FLASHCORE_CUDA}")
string(MD5 choices "${choices}")
string(SUBSTRING ${choices} 0 8 choices)
set(kept ${CMAKE_BINARY_DIR}/kept-${choices})

# What scikit-build-core and the user have set for this build.
set(settings)
get_cmake_property(names CACHE_VARIABLES)
list(FILTER names INCLUDE REGEX "^(FLASHCORE_|SKBUILD|Python_|CMAKE_((CXX|CUDA)_FLAGS|BUILD_TYPE|MAKE_PROGRAM|OSX_|TOOLCHAIN_FILE))")
list(FILTER names EXCLUDE REGEX "_DIR$")
foreach(name IN LISTS names)
  list(APPEND settings "-D${name}=${${name}}")
endforeach()
list(APPEND settings -DPython_INCLUDE_DIR=${Python_INCLUDE_DIR} -DPython_ROOT_DIR=${Python_ROOT_DIR})

# The environment's choices win over what an earlier install left in the cache.
foreach(name FLASHCORE_CUDA FLASHCORE_CUDA_ARCHS FLASHCORE_JAX)
  if(NOT DEFINED ${name})
    list(APPEND settings -U ${name})
  endif()
endforeach()
execute_process(
  COMMAND ${CMAKE_COMMAND} -S ${CMAKE_SOURCE_DIR} -B ${kept} -G ${CMAKE_GENERATOR} -DFLASHCORE_NESTED=ON -DFLASHCORE_PYTHON=ON ${settings}
  COMMAND_ERROR_IS_FATAL ANY)
add_custom_target(kept ALL COMMAND ${CMAKE_COMMAND} --build ${kept} --config $<CONFIG> USES_TERMINAL)
install(CODE "execute_process(COMMAND \"${CMAKE_COMMAND}\" --install \"${kept}\" --config \"\${CMAKE_INSTALL_CONFIG_NAME}\"
  --prefix \"\${CMAKE_INSTALL_PREFIX}\" --component python COMMAND_ERROR_IS_FATAL ANY)")
