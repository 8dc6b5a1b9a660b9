// The equation of reference.py on a CPU, in the graph: no Python between the forward pass's kernels.
//
// steerscope::tap_cpu reads a site's features and edits the steered tokens; steerscope::write_cpu
// adds what a site writes elsewhere. Compiled where it runs, against PyTorch's stable interface;
// see native.py, whose structures mirror those here field by field.
//
// Shapes: T tokens of the step, D model width, F features, S steering rows, E steered tokens,
// N rows of the tape (what the sites wrote since it was last rewound; see tape.py).

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

struct Step {         // what the batch plan says of the step
  int64_t first_row;  // of the tape: where the step's first token is written
  int64_t num_steered;
  const int64_t* steered_E;
  const int64_t* rows_T;
};

struct Decoder {  // what a site's features write at one place; null where they write nothing
  const float* W_dec_FD;
  const uint8_t* mine_F;
};

struct Site {
  int64_t width, num_features;
  int64_t is_probed;  // whether probe_D is kept up
  const float* panels;  // W_enc, by panels of features: [F / PANEL, D, PANEL], zeros at the end
  const float* b_enc_F;
  const float* threshold_F;  // both as long as the panels
  float* acts_NF;
  float* deltas_NF;
  float* doses_N;
  float* probe_D;
  const int64_t* edited_SF;
  const int64_t* num_edited_S;
  const int64_t* gate_index_SF;
  const float* parameters_SPF;
  const float* max_dose_S;
  Decoder here, there;
  const Step* step;
};

std::unordered_map<std::string, const Site*> sites;

// A panel is two vectors; so many tokens at a time keep their sums in registers.
#if defined(__AVX512F__)
constexpr int64_t LANES = 16, TOKENS = 8;
#else
constexpr int64_t LANES = 8, TOKENS = 4;
#endif
constexpr int64_t PANEL = 2 * LANES;
constexpr int64_t CHUNK_FLOATS = 1 << 16;  // of x at a time: what a second-level cache holds
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(4)));

inline const Lanes& lanes(const float* at) {
  return *reinterpret_cast<const Lanes*>(at);
}

enum PARAMETERS { SCALE, ADD, LO, HI, SELF_ABOVE, GATE_ABOVE, GATE_BELOW, NUM_PARAMETERS };

// A [T, D] tensor whose rows are contiguous.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  T* row(int64_t t) const { return data + t * stride; }
};

// The stream: hidden, or hidden + residual where vLLM keeps the sum split.
template <typename H, typename R>
struct Stream {
  Rows<H> hidden;
  Rows<R> residual;  // null data where there is none
  int64_t num_tokens, width;

  void read(int64_t t, float* x_D) const {
    const H* hidden_D = hidden.row(t);
    if (residual.data == nullptr) {
      for (int64_t d = 0; d < width; d++) x_D[d] = static_cast<float>(hidden_D[d]);
      return;
    }
    const R* residual_D = residual.row(t);
    for (int64_t d = 0; d < width; d++)
      x_D[d] = static_cast<float>(hidden_D[d]) + static_cast<float>(residual_D[d]);
  }
};

// Activations of NUM tokens in one panel of features.
template <int64_t NUM>
void encode_panel(const Site& site, int64_t panel, const float* x_TD, float* acts_TF) {
  const float* W = site.panels + panel * site.width * PANEL;
  const int64_t first = panel * PANEL;
  const Lanes b0 = lanes(site.b_enc_F + first), b1 = lanes(site.b_enc_F + first + LANES);
  Lanes sums[NUM][2];
  for (int64_t t = 0; t < NUM; t++) sums[t][0] = b0, sums[t][1] = b1;
  for (int64_t d = 0; d < site.width; d++, W += PANEL) {
    const Lanes w0 = lanes(W), w1 = lanes(W + LANES);
    for (int64_t t = 0; t < NUM; t++) {
      const float x = x_TD[t * site.width + d];
      sums[t][0] += x * w0;
      sums[t][1] += x * w1;
    }
  }
  const int64_t num_here = std::min(PANEL, site.num_features - first);
  for (int64_t t = 0; t < NUM; t++) {
    float f[PANEL];
    std::memcpy(f, sums[t], sizeof(f));
    for (int64_t i = 0; i < PANEL; i++)  // not-a-number stays what it is
      f[i] = f[i] <= site.threshold_F[first + i] ? 0.0f : f[i];
    std::memcpy(acts_TF + t * site.num_features + first, f, num_here * sizeof(float));
  }
}

// Of ``num`` tokens from ``t`` on, NUM at a time, and the rest by fewer. A token's sums are made in
// the same order whoever stands beside it.
template <int64_t NUM>
void encode_panel(
    const Site& site, int64_t panel, const float* x_TD, float* acts_TF, int64_t t, int64_t num) {
  for (; t + NUM <= num; t += NUM)
    encode_panel<NUM>(site, panel, x_TD + t * site.width, acts_TF + t * site.num_features);
  if constexpr (NUM > 1) encode_panel<NUM / 2>(site, panel, x_TD, acts_TF, t, num);
}

template <typename H, typename R>
void encode(const Site& site, const Stream<H, R>& stream, float* acts_TF) {
  const int64_t width = site.width, num_features = site.num_features;
  const int64_t num_panels = (num_features + PANEL - 1) / PANEL;
  const int64_t chunk = std::max(TOKENS, CHUNK_FLOATS / width / TOKENS * TOKENS);
  torch::stable::parallel_for(0, stream.num_tokens, 64, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> x_TD;
    x_TD.resize(chunk * width);
    for (int64_t first = begin; first < end; first += chunk) {
      const int64_t num = std::min(chunk, end - first);
      for (int64_t t = 0; t < num; t++) stream.read(first + t, x_TD.data() + t * width);
      for (int64_t panel = 0; panel < num_panels; panel++)
        encode_panel<TOKENS>(
            site, panel, x_TD.data(), acts_TF + first * num_features, 0, num);
    }
  });
}

// Write the steered tokens' changes; zero their doses.
void edit(const Site& site) {
  const Step& step = *site.step;
  const int64_t F = site.num_features;
  for (int64_t e = 0; e < step.num_steered; e++) {
    const int64_t t = step.steered_E[e], row = step.rows_T[t], at = step.first_row + t;
    const float* acts_F = site.acts_NF + at * F;
    const float* parameters_PF = site.parameters_SPF + row * NUM_PARAMETERS * F;
    float* deltas_F = site.deltas_NF + at * F;
    std::fill_n(deltas_F, F, 0.0f);
    site.doses_N[at] = 0.0f;
    for (int64_t j = 0; j < site.num_edited_S[row]; j++) {
      const int64_t f = site.edited_SF[row * F + j];
      const auto parameter = [&](PARAMETERS p) { return parameters_PF[p * F + f]; };
      const float act = acts_F[f], gate = acts_F[site.gate_index_SF[row * F + f]];
      if (!(act > parameter(SELF_ABOVE) && gate > parameter(GATE_ABOVE) &&
            gate < parameter(GATE_BELOW)))
        continue;
      float wanted = parameter(SCALE) * act + parameter(ADD);
      if (wanted < parameter(LO)) wanted = parameter(LO);
      if (wanted > parameter(HI)) wanted = parameter(HI);
      deltas_F[f] = wanted - act;
    }
  }
}

float norm(const std::vector<float>& v_D) {
  constexpr size_t LANES = 16;  // sums that do not wait for each other
  float sums[LANES] = {};
  size_t d = 0;
  for (; d + LANES <= v_D.size(); d += LANES)
    for (size_t i = 0; i < LANES; i++) sums[i] += v_D[d + i] * v_D[d + i];
  for (; d < v_D.size(); d++) sums[0] += v_D[d] * v_D[d];
  float sum = 0.0f;
  for (float each : sums) sum += each;
  return std::sqrt(sum);
}

// Add the changes of a decoder's features to the stream, capped. Their deltas are cut by what the
// cap left, doses are raised to this place's.
template <typename H, typename R>
void land(const Site& site, const Decoder& decoder, const Stream<H, R>& stream) {
  const Step& step = *site.step;
  const int64_t F = site.num_features, width = site.width;
  thread_local std::vector<float> change_D, y_D;
  change_D.resize(width), y_D.resize(width);
  for (int64_t e = 0; e < step.num_steered; e++) {
    const int64_t t = step.steered_E[e], row = step.rows_T[t], at = step.first_row + t;
    const int64_t num_edited = site.num_edited_S[row];
    const int64_t* edited_F = site.edited_SF + row * F;
    float* deltas_F = site.deltas_NF + at * F;
    bool is_changed = false;
    for (int64_t j = 0; j < num_edited; j++) {
      const float delta = deltas_F[edited_F[j]];
      if (!decoder.mine_F[edited_F[j]] || delta == 0.0f) continue;
      if (!is_changed) std::fill(change_D.begin(), change_D.end(), 0.0f);
      is_changed = true;
      const float* W_dec_D = decoder.W_dec_FD + edited_F[j] * width;
      for (int64_t d = 0; d < width; d++) change_D[d] += delta * W_dec_D[d];
    }
    if (!is_changed) continue;
    stream.read(t, y_D.data());
    const float dose = std::min(norm(change_D) / std::max(norm(y_D), FLT_MIN), FLT_MAX);
    const float share = dose > site.max_dose_S[row] ? site.max_dose_S[row] / dose : 1.0f;
    site.doses_N[at] = std::max(site.doses_N[at], dose * share);
    H* hidden_D = stream.hidden.row(t);
    for (int64_t d = 0; d < width; d++)
      hidden_D[d] = static_cast<H>(static_cast<float>(hidden_D[d]) + change_D[d] * share);
    for (int64_t j = 0; j < num_edited; j++)
      if (decoder.mine_F[edited_F[j]]) deltas_F[edited_F[j]] *= share;
  }
}

template <typename H, typename R>
void tap(const Site& site, const Stream<H, R>& stream) {
  if (site.is_probed && stream.num_tokens) stream.read(0, site.probe_D);
  encode(site, stream, site.acts_NF + site.step->first_row * site.num_features);
  if (!site.step->num_steered) return;
  edit(site);
  if (site.here.W_dec_FD) land(site, site.here, stream);
}

template <typename H, typename R>
void write(const Site& site, const Stream<H, R>& stream) {
  if (site.step->num_steered) land(site, site.there, stream);
}

// What the op's boxed arguments hold. The handles are ours to free.
struct Argument {
  AtenTensorHandle handle = nullptr;
  ~Argument() {
    if (handle) aoti_torch_delete_tensor_object(handle);
  }
  int64_t size(int64_t dim) const {
    int64_t found;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_size(handle, dim, &found));
    return found;
  }
  int64_t stride(int64_t dim) const {
    int64_t found;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_stride(handle, dim, &found));
    return found;
  }
  int32_t dtype() const {
    int32_t found;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &found));
    return found;
  }
  template <typename T>
  Rows<T> rows() const {
    if (handle == nullptr) return {nullptr, 0};
    if (size(0) && stride(1) != 1 && size(1) != 1)
      throw std::runtime_error("steerscope: a token's stream is not contiguous");
    void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
    return {static_cast<T*>(data), stride(0)};
  }
};

// Call ``visit`` with a null pointer of the tensor's type.
template <typename Visit>
void with_type(const Argument& argument, Visit visit) {
  const int32_t dtype = argument.dtype();
  if (dtype == aoti_torch_dtype_float32()) return visit(static_cast<float*>(nullptr));
  if (dtype == aoti_torch_dtype_bfloat16()) return visit(static_cast<c10::BFloat16*>(nullptr));
  if (dtype == aoti_torch_dtype_float16()) return visit(static_cast<c10::Half*>(nullptr));
  throw std::runtime_error("steerscope: the stream is neither float32, bfloat16 nor float16");
}

template <bool IS_WRITE>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  Argument hidden, residual;
  hidden.handle = torch::stable::detail::to<AtenTensorHandle>(stack[0]);
  if (auto* given = torch::stable::detail::to<StableIValue*>(stack[1])) {
    residual.handle = torch::stable::detail::to<AtenTensorHandle>(*given);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_stable_ivalue(given));
  }
  const auto name = torch::stable::detail::to<StringHandle>(stack[2]);
  const char* characters;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(name, &characters));
  const auto found = sites.find(characters);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(name));
  if (found == sites.end()) throw std::runtime_error("steerscope: no such site");
  const Site& site = *found->second;
  if (hidden.size(1) != site.width) throw std::runtime_error("steerscope: not the model's width");
  with_type(hidden, [&](auto* h) {
    using H = std::remove_pointer_t<decltype(h)>;
    with_type(residual.handle ? residual : hidden, [&](auto* r) {
      using R = std::remove_pointer_t<decltype(r)>;
      const Stream<H, R> stream{
          hidden.rows<H>(), residual.rows<R>(), hidden.size(0), site.width};
      IS_WRITE ? write(site, stream) : tap(site, stream);
    });
  });
}

}  // namespace

extern "C" int64_t steerscope_panel() { return PANEL; }

// ``site``, and the memory that it points to, must live as long as the site is used.
extern "C" void steerscope_register(const char* name, const Site* site) { sites[name] = site; }

STABLE_TORCH_LIBRARY_IMPL(steerscope, CPU, library) {
  library.impl("tap_cpu", &boxed<false>);
  library.impl("write_cpu", &boxed<true>);
}
