// jax_flash._ffi: the handlers as capsules, by platform, for jax_flash/launch.py to register.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <string>
#include <type_traits>

#include "ffi/handlers.h"
#include "jax_flash/kernels/params.h"

namespace nb = nanobind;

namespace {

nb::capsule Handler(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

nb::dict Targets(const std::string& platform) {
  nb::dict targets;
  if (platform == "cpu") {
    targets["jax_flash_cpu_forward"] = Handler(JaxFlashCpuForward);
    targets["jax_flash_cpu_backward"] = Handler(JaxFlashCpuBackward);
    targets["jax_flash_cpu_write"] = Handler(JaxFlashCpuWrite);
  } else if (platform == "cuda") {
    nb::dict stages;
    stages["instantiate"] = Handler(JaxFlashCudaLoad);
    stages["execute"] = Handler(JaxFlashCudaLaunch);
    targets["jax_flash_cuda_launch"] = stages;
  }
  return targets;
}

nb::dict Types(const std::string& platform) {
  nb::dict types;
  if (platform == "cuda") {
    const jax_flash::TypeRegistration registration = jax_flash::LoadedKernelType();
    nb::dict type;
    type["type_id"] = nb::capsule(registration.id);
    type["type_info"] = nb::capsule(registration.info);
    types["jax_flash_loaded_kernel"] = type;
  }
  return types;
}

nb::dict ParamFields() {
  nb::dict fields;
#define JAX_FLASH_FIELD(type, name) fields[#name] = std::is_same_v<type, float> ? "float" : "int";
  JAX_FLASH_PARAMS(JAX_FLASH_FIELD)
#undef JAX_FLASH_FIELD
  return fields;
}

}  // namespace

NB_MODULE(_ffi, module) {
  module.def("targets", &Targets, nb::arg("platform"), "FFI targets of a platform: name to capsule, or to stages.");
  module.def("types", &Types, nb::arg("platform"), "FFI types that the targets of a platform use.");
  module.def("param_fields", &ParamFields, "Fields of kernels/params.h in order: name to \"int\" or \"float\".");
}
