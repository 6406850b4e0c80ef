// What the module hands to JAX: the FFI handlers and the type of their state.
#pragma once

#include "xla/ffi/api/ffi.h"

extern "C" {
// cpu.cc
XLA_FFI_Error* JaxFlashCpuForward(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxFlashCpuBackward(XLA_FFI_CallFrame* call_frame);
// cpu_write.cc
XLA_FFI_Error* JaxFlashCpuWrite(XLA_FFI_CallFrame* call_frame);
// cuda.cc
XLA_FFI_Error* JaxFlashCudaLoad(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* JaxFlashCudaLaunch(XLA_FFI_CallFrame* call_frame);
}

namespace jax_flash {

struct TypeRegistration {
  xla::ffi::TypeId* id;
  const xla::ffi::TypeInfo* info;
};

// The state that JaxFlashCudaLoad makes and JaxFlashCudaLaunch takes.
TypeRegistration LoadedKernelType();

}  // namespace jax_flash
