// LORASB_TARGET_BEGIN("avx2,fma") ... LORASB_TARGET_END: functions between the two are compiled for that instruction
// set, whatever the rest of the build is for, so that one binary has them all. Includes of the standard library belong
// before the region: its inline functions would be compiled for that set and might be linked into other code.
#pragma once

#define LORASB_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LORASB_TARGET_BEGIN(features) \
  LORASB_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LORASB_TARGET_END LORASB_PRAGMA(clang attribute pop)
#else
#define LORASB_TARGET_BEGIN(features) LORASB_PRAGMA(GCC push_options) LORASB_PRAGMA(GCC target(features))
#define LORASB_TARGET_END LORASB_PRAGMA(GCC pop_options)
#endif
