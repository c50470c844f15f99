// float16 of the host compiler; its conversions round to nearest even, as the device's do.
#pragma once

using __half = _Float16;

inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }
