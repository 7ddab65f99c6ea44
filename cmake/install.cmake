# What `cmake --install` puts where, for find_package(heed) and for pkg-config.
include(CMakePackageConfigHelpers)

file(STRINGS ${PROJECT_SOURCE_DIR}/include/heed/heed.h header_version REGEX "^#define HEED_VERSION ")
if(NOT header_version STREQUAL "#define HEED_VERSION \"${PROJECT_VERSION}\"")
  message(FATAL_ERROR "include/heed/heed.h says '${header_version}', project() says ${PROJECT_VERSION}")
endif()

install(TARGETS heed EXPORT heedTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/heed DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
if(HEED_CUDA AND NOT BUILD_SHARED_LIBS)
  # Users of the static library link the CUDA runtime that it was built with.
  get_target_property(cudart CUDA::cudart_static IMPORTED_LOCATION)
  install(FILES ${cudart} DESTINATION ${CMAKE_INSTALL_LIBDIR})
  target_link_libraries(heed INTERFACE
    $<INSTALL_INTERFACE:$<INSTALL_PREFIX>/${CMAKE_INSTALL_LIBDIR}/libcudart_static.a$<SEMICOLON>rt$<SEMICOLON>dl>)
endif()
if(TARGET heed_cli)
  install(TARGETS heed_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

set(cmake_dir ${CMAKE_INSTALL_LIBDIR}/cmake/heed)
install(EXPORT heedTargets NAMESPACE heed:: DESTINATION ${cmake_dir})
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/heedConfig.cmake.in
  ${PROJECT_BINARY_DIR}/heedConfig.cmake INSTALL_DESTINATION ${cmake_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/heedConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/heedConfig.cmake ${PROJECT_BINARY_DIR}/heedConfigVersion.cmake
  DESTINATION ${cmake_dir})

# A static library needs what it was written in: its users may be C programs.
set(HEED_PC_LIBS "-pthread")
foreach(runtime IN ITEMS stdc++ c++ m)
  if(runtime IN_LIST CMAKE_CXX_IMPLICIT_LINK_LIBRARIES)
    string(APPEND HEED_PC_LIBS " -l${runtime}")
  endif()
endforeach()
if(HEED_CUDA)
  string(APPEND HEED_PC_LIBS " -lcudart_static -lrt -ldl")
endif()
if(BUILD_SHARED_LIBS)
  set(HEED_PC_LIBS "")
endif()
file(RELATIVE_PATH HEED_PC_PREFIX /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
configure_file(${CMAKE_CURRENT_LIST_DIR}/heed.pc.in ${PROJECT_BINARY_DIR}/heed.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/heed.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
