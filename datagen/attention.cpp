// Attention of one new token per slot over a static KV cache. HEAD_DIM and GROUPS (query heads to a KV head) are
// given to the compiler. Every (slot, KV head) is worked on by one thread from start to end, so the result does not
// depend on the number of threads.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t D = HEAD_DIM, G = GROUPS;

// The rotary embedding of one head.
inline void rotate(const float* x, const float* cos, const float* sin, float* out) {
  for (int64_t d = 0; d < D / 2; ++d) {
    out[d] = x[d] * cos[d] - x[d + D / 2] * sin[d];
    out[d + D / 2] = x[d + D / 2] * cos[d + D / 2] + x[d] * sin[d + D / 2];
  }
}

inline float dot(const float* a, const float* b) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += a[d] * b[d];
  return sum;
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

}  // namespace

// qkv [slots, (G + 2) * kv_heads * D]; cos, sin [slots, D]; position [slots]; keys, values [slots, kv_heads, length, D];
// out [slots, kv_heads * G * D].
extern "C" void attend(const float* qkv, const float* cos, const float* sin, const int64_t* position, float* keys,
                       float* values, float* out, int64_t slots, int64_t kv_heads, int64_t length) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(D));
#pragma omp parallel
  {
    std::vector<float> weights(G * length);
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t slot = 0; slot < slots; ++slot) {
      for (int64_t head = 0; head < kv_heads; ++head) {
        const float* heads = qkv + slot * (G + 2) * kv_heads * D;
        const float *c = cos + slot * D, *s = sin + slot * D;
        float* k = keys + (slot * kv_heads + head) * length * D;
        float* v = values + (slot * kv_heads + head) * length * D;
        const int64_t last = position[slot];

        rotate(heads + (G * kv_heads + head) * D, c, s, k + last * D);
        const float* value = heads + ((G + 1) * kv_heads + head) * D;
        for (int64_t d = 0; d < D; ++d) v[last * D + d] = value[d];
        float query[G][D];
        for (int64_t g = 0; g < G; ++g) {
          rotate(heads + (head * G + g) * D, c, s, query[g]);
          for (int64_t d = 0; d < D; ++d) query[g][d] *= scale;
        }

        for (int64_t t = 0; t <= last; ++t)
          for (int64_t g = 0; g < G; ++g) weights[g * length + t] = dot(query[g], k + t * D);
        float total[G];
        for (int64_t g = 0; g < G; ++g) {
          float* w = weights.data() + g * length;
          float largest = w[0], sum = 0;
#pragma omp simd reduction(max : largest)
          for (int64_t t = 0; t <= last; ++t) largest = w[t] > largest ? w[t] : largest;
#pragma omp simd reduction(+ : sum)
          for (int64_t t = 0; t <= last; ++t) {
            w[t] = exponential(w[t] - largest);
            sum += w[t];
          }
          total[g] = sum;
        }

        float mixed[G][D] = {};
        for (int64_t t = 0; t <= last; ++t)
          for (int64_t g = 0; g < G; ++g) {
            const float w = weights[g * length + t];
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) mixed[g][d] += w * v[t * D + d];
          }
        float* o = out + (slot * kv_heads + head) * G * D;
        for (int64_t g = 0; g < G; ++g)
          for (int64_t d = 0; d < D; ++d) o[g * D + d] = mixed[g][d] / total[g];
      }
    }
  }
}
