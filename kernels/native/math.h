// Elementary functions on vectors, after Cephes (Moshier 1984 - 1992, single precision): errors of a few last places.
#pragma once

#include "simd.h"

namespace peftserve::PEFTSERVE_ISA {

inline Vec polynomial(Vec, Vec value) { return value; }
// ((value * x + first) * x + ...) in Horner's scheme.
template <class... Rest>
inline Vec polynomial(Vec x, Vec value, float first, Rest... rest) {
  return polynomial(x, fma(value, x, broadcast(first)), rest...);
}

// e^x: 1 at 0 exactly, 0 below -87, infinity above 88.72, NaN of NaN.
inline Vec exp(Vec x) {
  const Vec n = round_to_integer(mul(x, broadcast(1.44269504f)));
  // ln 2 in two parts, so that the remainder loses nothing
  const Vec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
  const Vec p = polynomial(r, broadcast(1.9875691500e-4f), 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                           1.6666665459e-1f, 5.0000001201e-1f);
  const Vec mantissa = add(fma(p, mul(r, r), r), broadcast(1.0f));
  // 2^128 itself has no float
  const Vec value = scale_by_power(add(mantissa, mantissa), sub(n, broadcast(1.0f)));
  const Vec finite = select_greater(x, broadcast(88.7228f), broadcast(__builtin_inff()), value);
  return select_greater(broadcast(-87.0f), x, zero(), finite);
}

inline Vec sigmoid(Vec x) { return div(broadcast(1.0f), add(broadcast(1.0f), exp(sub(zero(), x)))); }

inline Vec abs(Vec x) { return max(x, sub(zero(), x)); }

inline Vec tanh(Vec x) {
  const Vec z = mul(x, x);
  const Vec p = polynomial(z, broadcast(-5.70498872745e-3f), 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                           -3.33332819422e-1f);
  const Vec small = fma(mul(p, z), x, x);
  const Vec far = sub(broadcast(1.0f), div(broadcast(2.0f), add(exp(add(abs(x), abs(x))), broadcast(1.0f))));
  const Vec large = select_greater(zero(), x, sub(zero(), far), far);
  return select_greater(abs(x), broadcast(0.625f), large, small);
}

// Abramowitz and Stegun 7.1.26: absolute error below 2e-7.
inline Vec erf(Vec x) {
  const Vec t = div(broadcast(1.0f), fma(abs(x), broadcast(0.3275911f), broadcast(1.0f)));
  const Vec p = mul(t, polynomial(t, broadcast(1.061405429f), -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f));
  const Vec value = sub(broadcast(1.0f), mul(p, exp(sub(zero(), mul(x, x)))));
  return select_greater(zero(), x, sub(zero(), value), value);
}

}  // namespace peftserve::PEFTSERVE_ISA
