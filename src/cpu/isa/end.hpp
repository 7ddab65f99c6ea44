// Closes the region that an isa/*.hpp header opened. Included once per binder, so not guarded.
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
