// A group of a matrix's columns packed by error feedback, and moved down by coordinates: `device_feedback`'s formulas, one
// thread a row. Each thread goes through its row's columns in order, so that a row's bits depend on its row alone.
//
// Arrays of a group are (GROUP, rows), a column of the matrix behind the other, so that threads side by side read weights
// side by side. What a thread changes is in shared memory, THREADS numbers a column; no thread reads what another wrote.

// STORED: how scales and biases are kept: 0 float32, 1 float16, 2 bfloat16. Rounded half to even, as arrays are.
template <int STORED>
__device__ __forceinline__ float stored(float value) {
  if (STORED == 2) {
    const uint32_t bits = __float_as_uint(value);
    return __uint_as_float((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
  }
  if (STORED == 1) {
    if (fabsf(value) >= 65520.0f) return copysignf(__uint_as_float(0x7f800000u), value);
    int exponent;
    frexpf(value, &exponent);
    const int last = (exponent - 1 < -14 ? -14 : exponent - 1) - 10;  // of the last bit that is kept
    return ldexpf(rintf(ldexpf(value, -last)), last);
  }
  return value;
}

__device__ __forceinline__ float nearest(float steps, float highest) {
  return fminf(fmaxf(rintf(steps), 0.0f), highest);
}

struct Line {
  float scale, bias;
};

// The line of min/max, as MLX's quantize finds it.
template <int GROUP, int THREADS>
__device__ __forceinline__ Line min_max(const float* column, float highest, float smallest_step) {
  float high = column[0], low = high;
  for (int j = 1; j < GROUP; ++j) {
    high = fmaxf(high, column[j * THREADS]);
    low = fminf(low, column[j * THREADS]);
  }
  const float longer = fabsf(high) - fabsf(low), edge = longer < 0 ? low : high;
  const float size = fmaxf((high - low) / highest, smallest_step), scale = longer < 0 ? size : -size;
  const float steps = rintf(edge / scale);
  return steps == 0 ? Line{scale, 0.0f} : Line{edge / steps, edge};
}

// moves: (N_MOVES, 2), how much longer the range gets and how far it shifts, in codes; the first N_STARTS move min/max's
// line, the others the best so far. steps: a column each, filled here: weights in steps of that line, half the codes off.
template <int GROUP, int THREADS, int N_STARTS, int N_MOVES>
__device__ __forceinline__ Line closest(
    const float* column, float* steps, const float* importance, const float* moves, Line line, float highest) {
  const float half = 0.5f * (highest + 1);
  float weight = 0, mean_step = 0;
  for (int j = 0; j < GROUP; ++j) {
    const float step = (column[j * THREADS] - line.bias) / line.scale - half;
    steps[j * THREADS] = step;
    weight += importance[j];
    mean_step += step * importance[j];
  }
  mean_step /= weight;
  float slope = 1, offset = 0, best = -1;
  for (int i = 0; i < N_MOVES; ++i) {
    const float factor = 1 + moves[2 * i] / highest, shift = moves[2 * i + 1];
    const float moved = i < N_STARTS ? 1.0f : slope, at = i < N_STARTS ? 0.0f : offset;
    const float tried = moved * factor, start = at + moved * (shift - 0.5f * (1 - factor));
    float sum_code = 0, sum_squares = 0, sum_both = 0;
    for (int j = 0; j < GROUP; ++j) {
      const float step = steps[j * THREADS];
      const float code = fminf(fmaxf(rintf((step - start) / tried), -half), half - 1);
      const float weighted = code * importance[j];
      sum_code += weighted;
      sum_squares += weighted * code;
      sum_both += weighted * step;
    }
    const float mean_code = sum_code / weight, variance = sum_squares - mean_code * sum_code;
    const float covariance = sum_both - mean_step * sum_code;
    if (variance > 0 && covariance * covariance > best * variance) {
      best = covariance * covariance / variance;
      slope = covariance / variance;
      offset = mean_step - slope * mean_code;
    }
  }
  return {line.scale * slope, line.bias + line.scale * (offset + half * (1 - slope))};
}

// What a group's errors count for once it is stored as `line`, its codes rounded to `rounded`.
template <int GROUP, int THREADS>
__device__ __forceinline__ float counted(
    const float* column, const float* importance, Line rounded, Line line, float highest) {
  float sum = 0;
  for (int j = 0; j < GROUP; ++j) {
    const float code = nearest((column[j * THREADS] - rounded.bias) / rounded.scale, highest);
    const float error = code * line.scale + line.bias - column[j * THREADS];
    sum += error * error * importance[j];
  }
  return sum;
}

template <int GROUP, int THREADS, int STORED, int N_STARTS, int N_MOVES>
__device__ __forceinline__ Line fitted_line(
    const float* column, float* steps, const float* importance, const float* moves, float highest, float smallest_step) {
  const Line first = min_max<GROUP, THREADS>(column, highest, smallest_step);
  const Line second = closest<GROUP, THREADS, N_STARTS, N_MOVES>(column, steps, importance, moves, first, highest);
  const Line kept_first = {stored<STORED>(first.scale), stored<STORED>(first.bias)};
  const Line kept_second = {stored<STORED>(second.scale), stored<STORED>(second.bias)};
  // rounded to the line before it is stored, as min/max does
  const float of_first = counted<GROUP, THREADS>(column, importance, first, kept_first, highest);
  const float of_second = counted<GROUP, THREADS>(column, importance, kept_second, kept_second, highest);
  return of_second < of_first ? kept_second : kept_first;
}

// What is where: the group's first channel, the block's channels, the matrix's rows, and the highest code.
struct Place {
  int first, channels, rows;
  float highest;
  __device__ __forceinline__ explicit Place(const int* at)
      : first(at[0]), channels(at[1]), rows(at[2]), highest((float)at[3]) {}
};

// A later column loses coupling[j, later] times the change of column j. coupling: its row's part behind j.
template <int GROUP, int THREADS>
__device__ __forceinline__ void lessen(float* column, const float* coupling, int j, float change) {
  #pragma unroll 8
  for (int k = j + 1; k < GROUP; ++k) column[k * THREADS] -= coupling[k] * change;
}

// Fit a group's line to columns, (GROUP, rows), and round them in turn, each error made up for by the later ones.
// upper: (channels, channels). Codes and errors, over the factor's diagonal: (GROUP, rows).
template <int GROUP, int THREADS, int STORED, int N_STARTS, int N_MOVES>
__device__ __forceinline__ void feed_back(
    const float* columns, const float* upper, const float* importance, const float* moves, const int* at, float smallest_step,
    float* codes, float* scales, float* biases, float* errors) {
  __shared__ float column_of[GROUP * THREADS], step_of[GROUP * THREADS];
  const Place place(at);
  const int row = blockIdx.x * THREADS + threadIdx.x;
  if (row >= place.rows) return;
  float *column = column_of + threadIdx.x, *steps = step_of + threadIdx.x;
  for (int j = 0; j < GROUP; ++j) column[j * THREADS] = columns[(size_t)j * place.rows + row];
  const Line line = fitted_line<GROUP, THREADS, STORED, N_STARTS, N_MOVES>(
      column, steps, importance + place.first, moves, place.highest, smallest_step);
  scales[row] = line.scale;
  biases[row] = line.bias;
  for (int j = 0; j < GROUP; ++j) {
    const float* u = upper + (size_t)(place.first + j) * place.channels + place.first;
    const float code = nearest((column[j * THREADS] - line.bias) / line.scale, place.highest);
    const float error = (column[j * THREADS] - (code * line.scale + line.bias)) / u[j];
    codes[(size_t)j * place.rows + row] = code;
    errors[(size_t)j * place.rows + row] = error;
    lessen<GROUP, THREADS>(column, u, j, error);
  }
}

// (products @ values)[j] of one row. products: its part for column j, whose sum is added to `all`.
template <int GROUP, int THREADS>
__device__ __forceinline__ float product(const float* products, const float* values, float& all) {
  float sum = 0;
  #pragma unroll 8
  for (int k = 0; k < GROUP; ++k) {
    sum += products[k] * values[k * THREADS];
    all += products[k];
  }
  return sum;
}

// Move a group's line, then each code in turn, to where the sum is least. products: (channels, channels); slopes: (channels,
// rows); old_codes: (GROUP, rows). Codes and by how much the weights change: (GROUP, rows).
template <int GROUP, int THREADS, int STORED>
__device__ __forceinline__ void descend(
    const float* products, const float* slopes, const float* old_codes, const float* old_scales, const float* old_biases,
    const int* at, float* codes, float* scales, float* biases, float* changes) {
  __shared__ float slope_of[GROUP * THREADS], code_of[GROUP * THREADS];
  const Place place(at);
  const int row = blockIdx.x * THREADS + threadIdx.x;
  if (row >= place.rows) return;
  float *slope = slope_of + threadIdx.x, *code = code_of + threadIdx.x;
  const float* h = products + (size_t)place.first * place.channels + place.first;
  float by_scale = 0, by_bias = 0;
  for (int j = 0; j < GROUP; ++j) {
    slope[j * THREADS] = slopes[(size_t)(place.first + j) * place.rows + row];
    code[j * THREADS] = old_codes[(size_t)j * place.rows + row];
    by_scale += slope[j * THREADS] * code[j * THREADS];
    by_bias += slope[j * THREADS];
  }
  float codes2 = 0, both = 0, ones = 0;
  for (int j = 0; j < GROUP; ++j) {
    const float weighted = product<GROUP, THREADS>(h + (size_t)j * place.channels, code, ones);
    codes2 += weighted * code[j * THREADS];
    both += weighted;
  }
  Line line = {old_scales[row], old_biases[row]};
  float more = 0, shift = 0;  // of the line
  const float determinant = codes2 * ones - both * both;
  if (determinant > 1e-6f * codes2 * ones) {
    const float scale = stored<STORED>(line.scale + (by_scale * ones - by_bias * both) / determinant);
    const float bias = stored<STORED>(line.bias + (codes2 * by_bias - both * by_scale) / determinant);
    const float longer = scale - line.scale, moved = bias - line.bias;
    const float gain = 2 * (longer * by_scale + moved * by_bias) -
                       (longer * longer * codes2 + 2 * longer * moved * both + moved * moved * ones);
    if (gain > 0 && scale != 0) {
      more = longer;
      shift = moved;
      line = {scale, bias};
    }
  }
  scales[row] = line.scale;
  biases[row] = line.bias;
  for (int j = 0; j < GROUP; ++j) {  // what the line changed; h is symmetric
    const float change = more * code[j * THREADS] + shift;
    const float* coupling = h + (size_t)j * place.channels;
    changes[(size_t)j * place.rows + row] = change;
    if (change != 0) lessen<GROUP, THREADS>(slope, coupling, -1, change);
  }
  for (int j = 0; j < GROUP; ++j) {
    const float* coupling = h + (size_t)j * place.channels;
    const float old = code[j * THREADS];
    const float best = nearest(slope[j * THREADS] / coupling[j] / line.scale + old, place.highest);
    const float change = (best - old) * line.scale;
    codes[(size_t)j * place.rows + row] = best;
    changes[(size_t)j * place.rows + row] += change;
    if (change != 0) lessen<GROUP, THREADS>(slope, coupling, j, change);
  }
}
