// The Python module `peftserve_kernels.cpu._native`: one function an op, on addresses and sizes.
//
// It checks nothing: the launchers in Python have. Calls keep the interpreter lock: they are short, and giving it up
// hundreds of times a step would let any busy thread take it for a switch interval each time. A replayed tape is one
// long call, and gives it up.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "isa.h"
#include "tape.h"

namespace nb = nanobind;

namespace peftserve {
namespace {

using Address = std::uintptr_t;

const Ops* current = ops_for(supported_isas().front());

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

bool set_isa(const std::string& isa) {
  const Ops* ops = ops_for(isa);
  if (ops != nullptr) current = ops;
  return ops != nullptr;
}

// [(target, in_features, out_offset, out_features), ...] of LoraSlice: tuples, read in place.
void read_slices(nb::handle slices, LoraAdd& to) {
  for (nb::handle item : slices) {
    if (to.slices == LoraAdd::kMostSlices) throw nb::value_error("slices: too many");
    const auto field = [&](int index) { return PyLong_AsLongLong(PyTuple_GET_ITEM(item.ptr(), index)); };
    to.slice[to.slices++] = {field(0), field(2), field(3)};
  }
}

}  // namespace

NB_MODULE(_native, m) {
  m.def("supported_isas", supported_isas, "Instruction sets that this processor can run, best first.");
  m.def("set_isa", set_isa, nb::arg("isa"), "Use one of them from now on; false, and no change, for any other name.");
  nb::class_<Tape>(m, "Tape")
      .def(nb::init<>())
      .def("start", [](Tape& tape, bool sampled) { tape.start(sampled ? Rows::kSampled : Rows::kTokens); },
           nb::arg("sampled"),
           "From here on calls are recorded instead of made; one tape at a time. `sampled`: they have a row for each "
           "token that is sampled after, instead of for each token.")
      .def("stop", &Tape::stop)
      .def("replay",
           [](Tape& tape, std::int64_t tokens, std::int64_t sequences, std::int64_t sampled) {
             return tape.replay({tokens, sequences, sampled});
           },
           nb::arg("tokens"), nb::arg("sequences"), nb::arg("sampled"), nb::call_guard<nb::gil_scoped_release>())
      .def("__len__", &Tape::size);
  m.def("nf4_linear", [](Address x, Address y, Address packed, Address absmax, Address bias, int dtype,
                         std::int64_t rows, std::int64_t columns, std::int64_t outputs, bool int8_inputs,
                         int threads) {
    call(current->nf4_linear,
         Nf4Linear{at<void>(x), at<void>(y), at<std::uint32_t>(packed), at<float>(absmax), at<float>(bias),
                   static_cast<Dtype>(dtype), rows, columns, outputs, int8_inputs, threads, nullptr, nullptr});
  });
  m.def("has_int8_inputs", [] { return current->int8_inputs; }, "Whether nf4_linear can round its inputs to 8 bits.");
  m.def("linear_logits", [](Address x, Address weight, Address y, int x_dtype, int weight_dtype, std::int64_t rows,
                            std::int64_t columns, std::int64_t outputs, int threads) {
    call(current->linear_logits,
         LinearLogits{at<void>(x), at<void>(weight), at<float>(y), static_cast<Dtype>(x_dtype),
                      static_cast<Dtype>(weight_dtype), rows, columns, outputs, threads});
  });
  m.def("rms_norm", [](Address x, Address weight, Address y, int dtype, int out_dtype, std::int64_t rows,
                       std::int64_t columns, float eps, int threads) {
    call(current->rms_norm,
         RmsNorm{at<void>(x), at<float>(weight), at<void>(y), static_cast<Dtype>(dtype), static_cast<Dtype>(out_dtype),
                 rows, columns, eps, threads});
  });
  m.def("residual_add", [](Address residual, Address hidden, Address y, int dtype, std::int64_t rows,
                           std::int64_t columns, int threads) {
    call(current->residual_add,
         ResidualAdd{at<float>(residual), at<void>(hidden), at<float>(y), static_cast<Dtype>(dtype), rows, columns,
                     threads});
  });
  m.def("silu_mul",
        [](Address gate_up, Address y, int dtype, std::int64_t rows, std::int64_t columns, int threads) {
          call(current->silu_mul,
               SiluMul{at<void>(gate_up), at<void>(y), static_cast<Dtype>(dtype), rows, columns, threads});
        });
  m.def("embedding", [](Address ids, Address table, Address y, bool wide_ids, int dtype, std::int64_t rows,
                        std::int64_t entries, std::int64_t columns, int threads) {
    return call(current->embedding,
                Embedding{at<void>(ids), at<void>(table), at<float>(y), wide_ids, static_cast<Dtype>(dtype), rows,
                          entries, columns, threads});
  });
  m.def("rope_and_store_kv",
        [](Address qkv, Address cos_sin, Address k_cache, Address v_cache, Address slots, Address q, Address q_norm,
           Address k_norm, int dtype, int cache_dtype, std::int64_t rows, std::int64_t num_heads,
           std::int64_t num_kv_heads, std::int64_t head_dim, std::int64_t page_size, float eps, int threads) {
          call(current->rope_and_store_kv,
               RopeAndStoreKv{at<void>(qkv), at<float>(cos_sin), at<void>(k_cache), at<void>(v_cache),
                              at<std::int64_t>(slots), at<void>(q), at<float>(q_norm), at<float>(k_norm),
                              static_cast<Dtype>(dtype), static_cast<Dtype>(cache_dtype), rows, num_heads, num_kv_heads,
                              head_dim, page_size, eps, threads});
        });
  m.def("paged_attention", [](Address q, Address out, Address k_cache, Address v_cache, Address block_tables,
                              Address query_start, Address context_len, int dtype, int cache_dtype,
                              std::int64_t tokens, std::int64_t sequences, std::int64_t max_blocks,
                              std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim,
                              std::int64_t page_size, std::int64_t window, float scale, int threads) {
    call(current->paged_attention,
         PagedAttention{at<void>(q), at<void>(out), at<void>(k_cache), at<void>(v_cache),
                        at<std::int32_t>(block_tables), at<std::int32_t>(query_start), at<std::int32_t>(context_len),
                        static_cast<Dtype>(dtype), static_cast<Dtype>(cache_dtype), tokens, sequences, max_blocks,
                        num_heads, num_kv_heads, head_dim, page_size, window, scale, threads, nullptr},
         Planned<PagedAttention, AttentionPlan>{current->plan_attention, {3, 2}});  // the nearest is too short
  });
  m.def("lora_add", [](Address y, Address x, Address start, Address slot, Address arena, Address rank, Address scale,
                       Address row_scale, Address a_page, Address b_page, nb::handle slices, int dtype,
                       int arena_dtype, std::int64_t tokens, std::int64_t columns, std::int64_t y_stride,
                       std::int64_t segments, std::int64_t layer, std::int64_t layers, std::int64_t targets,
                       std::int64_t pages, int threads) {
    LoraAdd args{at<void>(y), at<void>(x), at<std::int32_t>(start), at<std::int32_t>(slot), at<void>(arena),
                 at<std::int32_t>(rank), at<float>(scale), at<std::int64_t>(row_scale), at<std::int64_t>(a_page),
                 at<std::int64_t>(b_page), {}, static_cast<Dtype>(dtype), static_cast<Dtype>(arena_dtype), tokens,
                 columns, y_stride, segments, 0, layer, layers, targets, pages, current->own_rows,
                 threads, nullptr};
    read_slices(slices, args);
    call(current->lora_add, args,
         Planned<LoraAdd, LowRankPlan>{current->plan_lora, {1, 1}, current->lora_begin, current->lora_end});
  });
  m.def("bottleneck_add", [](Address stream, Address hidden, Address residual, Address start, Address slot,
                             Address arena, Address width, Address scale, Address down_page, Address up_page,
                             Address down_bias, Address up_bias, Address activation, Address input_mode, int dtype,
                             int arena_dtype, std::int64_t tokens, std::int64_t columns, std::int64_t segments,
                             std::int64_t layer, std::int64_t site, std::int64_t layers, std::int64_t pages,
                             int threads) {
    call(current->bottleneck_add,
         BottleneckAdd{at<float>(stream), at<void>(hidden), at<float>(residual), at<std::int32_t>(start),
                       at<std::int32_t>(slot), at<void>(arena), at<std::int32_t>(width), at<float>(scale),
                       at<std::int64_t>(down_page), at<std::int64_t>(up_page), at<std::int64_t>(down_bias),
                       at<std::int64_t>(up_bias), at<std::int32_t>(activation), at<std::int32_t>(input_mode),
                       static_cast<Dtype>(dtype), static_cast<Dtype>(arena_dtype), tokens, columns, segments, layer,
                       site, layers, pages, current->own_rows, threads, nullptr},
         Planned<BottleneckAdd, LowRankPlan>{current->plan_bottleneck, {1, 1}});
  });
  m.def("sample", [](Address logits, Address temperature, Address top_k, Address top_p, Address min_p,
                     Address uniform, Address ids, std::int64_t rows, std::int64_t vocab, int threads) {
    call(current->sample,
         Sample{at<float>(logits), at<float>(temperature), at<std::int32_t>(top_k), at<float>(top_p), at<float>(min_p),
                at<double>(uniform), at<std::int64_t>(ids), rows, vocab, threads});
  });
}

}  // namespace peftserve
