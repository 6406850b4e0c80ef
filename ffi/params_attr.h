// Tells XLA's FFI how to decode the attribute `params` into Params: field for field, nothing missing, nothing extra.
#pragma once

#include "jax_flash/kernels/params.h"
#include "xla/ffi/api/ffi.h"

// The list gives every member a leading comma; the second macro makes those commas separate arguments.
#define JAX_FLASH_MEMBER(type, name) , StructMember<type>(#name)
#define JAX_FLASH_REGISTER(...) XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(__VA_ARGS__)
JAX_FLASH_REGISTER(jax_flash::Params JAX_FLASH_PARAMS(JAX_FLASH_MEMBER));
#undef JAX_FLASH_REGISTER
#undef JAX_FLASH_MEMBER
