// Writes rows to their places in a cache on the CPU, where XLA would first widen a whole cache of narrow floats.

#include <cstring>

#include "ffi/handlers.h"
#include "ffi/status.h"

namespace jax_flash::cpu {
namespace {

using Places = ffi::Buffer<ffi::S32, 2>;

// `written` is the buffer of `cache`, (groups, rows, ...). Each of `rows`, (groups of them, rows, ...), goes to a group
// and a row of it, or nowhere if there are none such.
Status Write(const ffi::AnyBuffer& cache, const ffi::AnyBuffer& rows, const Places& group, const Places& row,
             const ffi::AnyBuffer& written) {
  const auto sizes = cache.dimensions();
  if (sizes.size() < 2) return Status::InvalidArgument("a cache must have groups of rows");
  if (written.untyped_data() != cache.untyped_data()) return Status::InvalidArgument("the cache must be the result");
  if (cache.element_count() == 0) return Status::Ok();
  const int64_t row_bytes = cache.size_bytes() / (sizes[0] * sizes[1]);
  const int64_t count = group.element_count();
  if (static_cast<int64_t>(row.element_count()) != count ||
      static_cast<int64_t>(rows.size_bytes()) != count * row_bytes) {
    return Status::InvalidArgument("rows must be those of the cache, with a place for each");
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t to_group = group.typed_data()[i];
    const int64_t to_row = row.typed_data()[i];
    if (to_group < 0 || to_group >= sizes[0] || to_row < 0 || to_row >= sizes[1]) continue;
    std::memcpy(static_cast<char*>(written.untyped_data()) + (to_group * sizes[1] + to_row) * row_bytes,
                static_cast<const char*>(rows.untyped_data()) + i * row_bytes, row_bytes);
  }
  return Status::Ok();
}

ffi::Error HandleWrite(ffi::AnyBuffer cache, ffi::AnyBuffer rows, Places group, Places row,
                       ffi::Result<ffi::AnyBuffer> written) {
  return Write(cache, rows, group, row, *written).ToError();
}

auto BindWrite() {
  return ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Places>().Arg<Places>().Ret<ffi::AnyBuffer>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFlashCpuWrite, HandleWrite, BindWrite());

}  // namespace jax_flash::cpu
