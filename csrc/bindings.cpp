// Python bindings: the parameter structs, field by field, and one function per launch. Pointers and
// streams are passed as integers, so the extension is built without torch and works with any version.
#include <pybind11/pybind11.h>

#include "attention.h"
#include "kv_move.h"

#ifndef VOCO_MODULE_NAME
#define VOCO_MODULE_NAME _C
#endif

namespace py = pybind11;

namespace {

template <typename Class, typename Pointer>
void pointer(py::class_<Class>& to, const char* name, Pointer* Class::* field) {
  to.def_property(
      name, [field](const Class& self) { return reinterpret_cast<uintptr_t>(self.*field); },
      [field](Class& self, uintptr_t value) { self.*field = reinterpret_cast<Pointer*>(value); });
}

template <typename Params>
void function(py::module_& to, const char* name, void (*launch)(const Params&, void*)) {
  to.def(
      name,
      [launch](const Params& params, uintptr_t stream) {
        launch(params, reinterpret_cast<void*>(stream));
      },
      py::arg("params"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(VOCO_MODULE_NAME, m) {
  // Module-local because the tests load this extension together with its emulation.
  py::class_<Tensor4>(m, "Tensor4", py::module_local())
      .def(py::init([](uintptr_t data, int64_t batch_stride, int64_t head_stride, int64_t token_stride) {
             return Tensor4{reinterpret_cast<void*>(data), batch_stride, head_stride, token_stride};
           }),
           py::arg("data"), py::arg("batch_stride"), py::arg("head_stride"), py::arg("token_stride"));

  py::class_<AttentionParams> attention(m, "AttentionParams", py::module_local());
  attention.def(py::init([] { return AttentionParams{}; }))
      .def_readwrite("batch", &AttentionParams::batch)
      .def_readwrite("heads", &AttentionParams::heads)
      .def_readwrite("kv_heads", &AttentionParams::kv_heads)
      .def_readwrite("length", &AttentionParams::length)
      .def_readwrite("head_dim", &AttentionParams::head_dim)
      .def_readwrite("bf16", &AttentionParams::bf16)
      .def_readwrite("scale", &AttentionParams::scale)
      .def_readwrite("device", &AttentionParams::device)
      .def_readwrite("q", &AttentionParams::q)
      .def_readwrite("k", &AttentionParams::k)
      .def_readwrite("v", &AttentionParams::v)
      .def_readwrite("out", &AttentionParams::out)
      .def_readwrite("dout", &AttentionParams::dout)
      .def_readwrite("dq", &AttentionParams::dq)
      .def_readwrite("dk", &AttentionParams::dk)
      .def_readwrite("dv", &AttentionParams::dv);
  pointer(attention, "lse", &AttentionParams::lse);
  pointer(attention, "dlse", &AttentionParams::dlse);
  pointer(attention, "delta", &AttentionParams::delta);
  pointer(attention, "dq_sum", &AttentionParams::dq_sum);
  pointer(attention, "visible_from", &AttentionParams::visible_from);
  pointer(attention, "query_tiles", &AttentionParams::query_tiles);
  pointer(attention, "key_tiles", &AttentionParams::key_tiles);
  pointer(attention, "counts", &AttentionParams::counts);
  pointer(attention, "kept", &AttentionParams::kept);
  pointer(attention, "readers", &AttentionParams::readers);
  pointer(attention, "next_item", &AttentionParams::next_item);

  function(m, "attention_forward_sm90", attention_forward_sm90);
  function(m, "attention_backward_sm90", attention_backward_sm90);

  py::enum_<Element>(m, "Element", py::module_local())
      .value("bf16", Element::bf16)
      .value("fp16", Element::fp16)
      .value("fp32", Element::fp32)
      .value("int8", Element::int8)
      .value("e4m3", Element::e4m3);

  py::class_<KvMoveParams> move(m, "KvMoveParams", py::module_local());
  move.def(py::init([] { return KvMoveParams{}; }))
      .def_readwrite("to_cache", &KvMoveParams::to_cache)
      .def_readwrite("device", &KvMoveParams::device)
      .def_readwrite("num_entries", &KvMoveParams::num_entries)
      .def_readwrite("num_layers", &KvMoveParams::num_layers)
      .def_readwrite("num_kv_heads", &KvMoveParams::num_kv_heads)
      .def_readwrite("head_dim", &KvMoveParams::head_dim)
      .def_readwrite("most_tokens", &KvMoveParams::most_tokens)
      .def_readwrite("head_stride", &KvMoveParams::head_stride)
      .def_readwrite("entry_type", &KvMoveParams::entry_type)
      .def_readwrite("cache_type", &KvMoveParams::cache_type)
      .def_readwrite("rotary_dim", &KvMoveParams::rotary_dim)
      .def_readwrite("interleaved", &KvMoveParams::interleaved)
      .def_readwrite("length", &KvMoveParams::length);
  pointer(move, "entries", &KvMoveParams::entries);
  pointer(move, "tokens", &KvMoveParams::tokens);
  pointer(move, "bases", &KvMoveParams::bases);
  pointer(move, "inv_freq", &KvMoveParams::inv_freq);
  pointer(move, "lengths", &KvMoveParams::lengths);

  function(m, "kv_move", kv_move);
}
