# SPDX-License-Identifier: Apache-2.0
# Compiles through ccache where it is present. Set so that another clone of the same sources hits too: paths below the
# sources count relative to the build folder, and the compiler by its content, not by its time.
# Another launcher: CMAKE_CXX_COMPILER_LAUNCHER and CMAKE_CUDA_COMPILER_LAUNCHER; none: FLASHCORE_CCACHE=OFF.
option(FLASHCORE_CCACHE "Compile through ccache where present" ON)
if(FLASHCORE_CCACHE AND UNIX)
  find_program(CCACHE_PROGRAM ccache)
  find_program(ENV_PROGRAM env)
  mark_as_advanced(CCACHE_PROGRAM ENV_PROGRAM)
  if(CCACHE_PROGRAM AND ENV_PROGRAM)
    set(launcher ${ENV_PROGRAM} CCACHE_COMPILERCHECK=content CCACHE_NOHASHDIR=1 CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} ${CCACHE_PROGRAM})
    foreach(language CXX CUDA)
      if(NOT DEFINED CMAKE_${language}_COMPILER_LAUNCHER)
        set(CMAKE_${language}_COMPILER_LAUNCHER ${launcher})
      endif()
    endforeach()
  endif()
endif()
