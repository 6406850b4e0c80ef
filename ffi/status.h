// Errors of the handlers: XLA's own type, made impossible to drop.
#pragma once

#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_flash {

namespace ffi = xla::ffi;

class [[nodiscard]] Status {
 public:
  static Status Ok() { return Status(); }
  static Status InvalidArgument(std::string message) { return Status(ffi::Error::InvalidArgument(std::move(message))); }
  static Status Internal(std::string message) { return Status(ffi::Error::Internal(std::move(message))); }

  bool ok() const { return error_.success(); }
  ffi::Error ToError() && { return std::move(error_); }

 private:
  Status() : error_(ffi::Error::Success()) {}
  explicit Status(ffi::Error error) : error_(std::move(error)) {}

  ffi::Error error_;
};

// Leaves the surrounding function, which returns Status, with the first failure.
#define RETURN_IF_ERROR(expression)             \
  do {                                          \
    ::jax_flash::Status status_ = (expression); \
    if (!status_.ok()) return status_;          \
  } while (false)

}  // namespace jax_flash
