// The ops between a decoder layer's products, one short block each: rms_norm, silu_mul; and int8_linear,
// which a CPU leaves to torch.
#include "bind.h"

namespace vispec::bindings {
namespace {

void rms_norm(py::handle hidden_, py::handle weight, py::handle output_, py::handle residual_, double epsilon,
              bool parity, uintptr_t stream) {
  const TensorView hidden("hidden", hidden_), output("output", output_);
  RmsNorm op{};
  op.hidden = hidden.data();
  op.weight = TensorView("weight", weight).data();
  op.output = output.data();
  op.hidden_stride = hidden.stride(0);
  op.output_stride = output.stride(0);
  if (!residual_.is_none()) {
    const TensorView residual("residual", residual_);
    op.residual = residual.data();
    op.residual_stride = residual.stride(0);
  }
  op.dtype = hidden.floating();
  op.epsilon = static_cast<float>(epsilon);
  op.parity = parity ? 1 : 0;
  op.M = hidden.size(0);
  op.C = hidden.size(1);
  op.stream = stream_of(stream);
  run(VISPEC_DISPATCH(rms_norm, hidden.cuda()), op);
}

void silu_mul(py::handle gate_, py::handle up_, py::handle output_, bool parity, uintptr_t stream) {
  const TensorView gate("gate", gate_), up("up", up_), output("output", output_);
  SiluMul op{};
  op.gate = gate.data();
  op.up = up.data();
  op.output = output.data();
  op.gate_stride = gate.stride(0);
  op.up_stride = up.stride(0);
  op.output_stride = output.stride(0);
  op.dtype = gate.floating();
  op.parity = parity ? 1 : 0;
  op.M = gate.size(0);
  op.I = gate.size(1);
  op.stream = stream_of(stream);
  run(VISPEC_DISPATCH(silu_mul, gate.cuda()), op);
}

#if defined(VISPEC_HAS_KERNELS)
void int8_linear(py::handle rows_, py::handle weight_, py::handle scales, py::handle output_, py::handle bias,
                 uintptr_t stream) {
  const TensorView rows("rows", rows_), weight("weight", weight_), output("output", output_);
  Int8Linear op{};
  op.rows = rows.data();
  op.weight = weight.int8s();
  op.scales = TensorView("scales", scales).floats();
  if (!bias.is_none()) op.bias = TensorView("bias", bias).data();
  op.output = output.data();
  op.row_stride = rows.stride(0);
  op.output_stride = output.stride(0);
  op.dtype = rows.floating();
  op.M = rows.size(0);
  op.N = weight.size(0);
  op.C = rows.size(1);
  op.stream = stream_of(stream);
  run(cuda::int8_linear, op);
}
#endif

}  // namespace

void bind_layer(py::module_& module) {
  using py::arg;
  module.def("rms_norm", rms_norm, arg("hidden"), arg("weight"), py::kw_only(), arg("output"),
             arg("residual"), arg("epsilon"), arg("parity"), arg("stream"));
  module.def("silu_mul", silu_mul, arg("gate"), arg("up"), py::kw_only(), arg("output"), arg("parity"),
             arg("stream"));
#if defined(VISPEC_HAS_KERNELS)
  module.def("int8_linear", int8_linear, arg("rows"), arg("weight"), arg("scales"), py::kw_only(),
             arg("output"), arg("bias"), arg("stream"));
#endif
}

}  // namespace vispec::bindings
