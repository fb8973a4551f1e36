// Attention of one new token per slot over a static KV cache. HEAD_DIM and GROUPS (query heads to a KV head) are
// given to the compiler. Every (slot, KV head) is worked on by one thread from start to end, so the result does not
// depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t D = HEAD_DIM, G = GROUPS;
constexpr int64_t LANES = 16;  // tokens of a block of keys, and floats of a vector
constexpr int64_t CHAINS = G >= 8 ? 1 : G >= 3 ? 2 : 4;  // sums kept side by side, so that additions need not wait
constexpr int64_t AT_ONCE = D >= 16 * LANES ? 1 : 16 * LANES / D;  // query heads whose outputs fit the registers

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));

// The rotary embedding of one head.
inline void rotate(const float* x, const float* cos, const float* sin, float* out) {
  for (int64_t d = 0; d < D / 2; ++d) {
    out[d] = x[d] * cos[d] - x[d + D / 2] * sin[d];
    out[d + D / 2] = x[d + D / 2] * cos[d + D / 2] + x[d] * sin[d + D / 2];
  }
}

// e^x for x <= 0, to the last bit or two of fp32, in operations that a compiler can do on many numbers at a time.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float whole = std::nearbyint(x * 1.44269504f);
  const float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  float power = 1.0f / 5040;
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    power = power * rest + factor;  // Taylor: |rest| <= ln 2 / 2
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return power * scale;
}

// scores[g][0..LANES) = queries g times a block of keys [D, LANES].
inline void score(const float (*query)[D], const float* block, float* scores, int64_t stride) {
  vec sum[CHAINS][G] = {};
  for (int64_t d = 0; d < D; d += CHAINS)
#pragma GCC unroll 8
    for (int64_t c = 0; c < CHAINS; ++c) {
      const vec keys = *reinterpret_cast<const vec*>(block + (d + c) * LANES);
#pragma GCC unroll 16
      for (int64_t g = 0; g < G; ++g) sum[c][g] += query[g][d + c] * keys;
    }
#pragma GCC unroll 16
  for (int64_t g = 0; g < G; ++g) {
    vec total = sum[0][g];
    for (int64_t c = 1; c < CHAINS; ++c) total += sum[c][g];
    *reinterpret_cast<vec*>(scores + g * stride) = total;
  }
}

// out[g] = the mean of values [tokens, D], weighted by weights[g] [tokens], for N query heads.
template <int64_t N>
inline void mix(const float* weights, int64_t stride, const float* totals, const float* values, int64_t tokens,
                float* out) {
  vec sum[N][D / LANES] = {};
  for (int64_t t = 0; t < tokens; ++t)
#pragma GCC unroll 16
    for (int64_t i = 0; i < D / LANES; ++i) {
      const vec value = *reinterpret_cast<const vec*>(values + t * D + i * LANES);
#pragma GCC unroll 16
      for (int64_t g = 0; g < N; ++g) sum[g][i] += weights[g * stride + t] * value;
    }
#pragma GCC unroll 16
  for (int64_t g = 0; g < N; ++g)
#pragma GCC unroll 16
    for (int64_t i = 0; i < D / LANES; ++i) *reinterpret_cast<vec*>(out + g * D + i * LANES) = sum[g][i] / totals[g];
}

}  // namespace

// qkv [slots, (G + 2) * kv_heads * D]; cos, sin [slots, D]; position [slots];
// keys [slots, kv_heads, length / LANES, D, LANES]; values [slots, kv_heads, length, D]; out [slots, kv_heads * G * D].
// A token sees the last ``window`` tokens, itself included.
extern "C" void attend(const float* qkv, const float* cos, const float* sin, const int64_t* position, float* keys,
                       float* values, float* out, int64_t slots, int64_t kv_heads, int64_t length, int64_t window) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(D));
#pragma omp parallel
  {
    std::vector<float> all_weights(G * length);
    float* weights = all_weights.data();
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t slot = 0; slot < slots; ++slot) {
      for (int64_t head = 0; head < kv_heads; ++head) {
        const float* heads = qkv + slot * (G + 2) * kv_heads * D;
        const float *c = cos + slot * D, *s = sin + slot * D;
        float* k = keys + (slot * kv_heads + head) * length * D;
        float* v = values + (slot * kv_heads + head) * length * D;
        const int64_t last = position[slot], first = last >= window ? last - window + 1 : 0, tokens = last + 1 - first;

        float key[D], query[G][D];
        rotate(heads + (G * kv_heads + head) * D, c, s, key);
        for (int64_t d = 0; d < D; ++d) k[(last / LANES * D + d) * LANES + last % LANES] = key[d];
        std::memcpy(v + last * D, heads + ((G + 1) * kv_heads + head) * D, sizeof key);
        for (int64_t g = 0; g < G; ++g) {
          rotate(heads + (head * G + g) * D, c, s, query[g]);
          for (int64_t d = 0; d < D; ++d) query[g][d] *= scale;
        }

        for (int64_t block = first / LANES; block <= last / LANES; ++block)
          score(query, k + block * LANES * D, weights + block * LANES, length);
        float totals[G];
        for (int64_t g = 0; g < G; ++g) {
          float* w = weights + g * length + first;
          float largest = w[0], sum = 0;
#pragma omp simd reduction(max : largest)
          for (int64_t t = 0; t < tokens; ++t) largest = w[t] > largest ? w[t] : largest;
#pragma omp simd reduction(+ : sum)
          for (int64_t t = 0; t < tokens; ++t) {
            w[t] = exponential(w[t] - largest);
            sum += w[t];
          }
          totals[g] = sum;
        }

        float* o = out + (slot * kv_heads + head) * G * D;
        int64_t g = 0;
        for (; g + AT_ONCE <= G; g += AT_ONCE)
          mix<AT_ONCE>(weights + g * length + first, length, totals + g, v + first * D, tokens, o + g * D);
        if constexpr (G % AT_ONCE > 0)
          mix<G % AT_ONCE>(weights + g * length + first, length, totals + g, v + first * D, tokens, o + g * D);
      }
    }
  }
}
