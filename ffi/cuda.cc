// The CUDA handlers: Load turns a cubin into a kernel when the program is instantiated, Launch launches it. They know
// nothing of attention: grid, shared memory, tensor maps, parameters and order come as attributes
// (jax_flash/cuda.py).
//
// XLA captures Launch into a CUDA graph, so it neither synchronises, copies from the host nor allocates.
#include "cuda.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "ffi/handlers.h"
#include "ffi/params_attr.h"
#include "ffi/status.h"

namespace jax_flash {

// One tensor map as tensor_map.TensorMap flattens it.
struct TensorMapRecord {
  static constexpr int kRank = 4;

  int64_t operand;
  int64_t element_bytes;
  int64_t swizzle_bytes;
  std::array<int64_t, kRank> dims;         // elements, innermost first
  std::array<int64_t, kRank - 1> strides;  // bytes, of all dims but the innermost
  std::array<int64_t, kRank> box;          // elements
};

// The attributes of a call, by name.
struct LaunchAttributes {
  ffi::Span<const uint8_t> cubin;
  std::string_view entry;
  ffi::Span<const int64_t> tensor_maps;
  int64_t grid;
  int64_t cluster;  // CTAs of one
  int64_t threads;
  int64_t shared_bytes;
  int64_t counters;  // the result that counts from 0, or -1
  Params params;
  ffi::Span<const int32_t> order;  // of work: numbers that only Python and the kernel know
};

}  // namespace jax_flash

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_flash::LaunchAttributes, StructMember<ffi::Span<const uint8_t>>("cubin"),
                                      StructMember<std::string_view>("entry"),
                                      StructMember<ffi::Span<const int64_t>>("tensor_maps"),
                                      StructMember<int64_t>("grid"), StructMember<int64_t>("cluster"),
                                      StructMember<int64_t>("threads"), StructMember<int64_t>("shared_bytes"),
                                      StructMember<int64_t>("counters"), StructMember<jax_flash::Params>("params"),
                                      StructMember<ffi::Span<const int32_t>>("order"));

namespace jax_flash {
namespace {

// The driver's functions in use. libcuda is opened at the first kernel, so the module loads on machines without it.
#define JAX_FLASH_DRIVER_FUNCTIONS(X) \
  X(cuGetErrorString)                 \
  X(cuLibraryLoadData)                \
  X(cuLibraryUnload)                  \
  X(cuLibraryGetKernel)               \
  X(cuKernelSetAttribute)             \
  X(cuCtxGetDevice)                   \
  X(cuTensorMapEncodeTiled)           \
  X(cuMemsetD32Async)                 \
  X(cuLaunchKernelEx)

struct Driver {
#define JAX_FLASH_DECLARE(function) decltype(&::function) function = nullptr;
  JAX_FLASH_DRIVER_FUNCTIONS(JAX_FLASH_DECLARE)
#undef JAX_FLASH_DECLARE
  std::string missing;  // what could not be found; empty when all is there

  static const Driver& Get() {
    static const Driver driver;
    return driver;
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
      missing = std::string("the CUDA driver, libcuda.so.1, cannot be opened: ") + dlerror();
      return;
    }
#define JAX_FLASH_FIND(function)                                              \
  function = reinterpret_cast<decltype(function)>(dlsym(library, #function)); \
  if (function == nullptr) missing = "the CUDA driver is too old: it lacks " #function;
    JAX_FLASH_DRIVER_FUNCTIONS(JAX_FLASH_FIND)
#undef JAX_FLASH_FIND
  }
};

Status Check(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) return Status::Ok();
  const char* text = nullptr;
  Driver::Get().cuGetErrorString(result, &text);
  return Status::Internal(std::string(call) + " failed: " + (text != nullptr ? text : std::to_string(result).c_str()));
}

#define CUDA_CHECK(function, ...) RETURN_IF_ERROR(Check(Driver::Get().function(__VA_ARGS__), #function))

// What Load leaves for Launch. A library belongs to no context: one load serves all devices.
struct LoadedKernel {
  static ffi::TypeId id;

  LoadedKernel() = default;
  LoadedKernel(const LoadedKernel&) = delete;
  LoadedKernel& operator=(const LoadedKernel&) = delete;
  ~LoadedKernel() {
    if (library != nullptr) Driver::Get().cuLibraryUnload(library);
  }

  CUlibrary library = nullptr;
  CUkernel kernel = nullptr;
};

ffi::TypeId LoadedKernel::id = {};
const ffi::TypeInfo kLoadedKernelInfo = ffi::MakeTypeInfo<LoadedKernel>();

// The driver kills the process over a truncated image, so its length is checked against its own ELF header first.
Status CheckImage(ffi::Span<const uint8_t> cubin) {
  constexpr size_t kHeaderBytes = 64;
  if (cubin.size() < kHeaderBytes || std::memcmp(cubin.begin(), "\177ELF", 4) != 0) {
    return Status::InvalidArgument("the kernel image is not an ELF file");
  }
  // Program headers, then section headers: where the table's offset, the size of an entry and their number stand.
  constexpr size_t kTables[2][3] = {{32, 54, 56}, {40, 58, 60}};
  for (const auto& [offset_at, size_at, count_at] : kTables) {
    uint64_t offset;
    uint16_t size, count;
    std::memcpy(&offset, cubin.begin() + offset_at, sizeof(offset));
    std::memcpy(&size, cubin.begin() + size_at, sizeof(size));
    std::memcpy(&count, cubin.begin() + count_at, sizeof(count));
    if (offset > cubin.size() || uint64_t{size} * count > cubin.size() - offset) {
      return Status::InvalidArgument("the kernel image is truncated");
    }
  }
  return Status::Ok();
}

Status LoadKernel(const LaunchAttributes& attributes, LoadedKernel& loaded) {
  if (!Driver::Get().missing.empty()) return Status::Internal(Driver::Get().missing);
  RETURN_IF_ERROR(CheckImage(attributes.cubin));
  CUDA_CHECK(cuLibraryLoadData, &loaded.library, attributes.cubin.begin(), nullptr, nullptr, 0, nullptr, nullptr, 0);
  CUDA_CHECK(cuLibraryGetKernel, &loaded.kernel, loaded.library, std::string(attributes.entry).c_str());
  return Status::Ok();
}

ffi::ErrorOr<std::unique_ptr<LoadedKernel>> Load(LaunchAttributes attributes) {
  auto loaded = std::make_unique<LoadedKernel>();
  Status status = LoadKernel(attributes, *loaded);
  if (!status.ok()) return ffi::Unexpected(std::move(status).ToError());
  return loaded;
}

// What a kernel takes: the maps, the pointers of all operands and then of all results, the parameters, the order. A
// kernel that declares fewer maps, pointers or numbers of the order reads the first of them.
constexpr int kMaxMaps = 4;
constexpr int kMaxPointers = 24;
constexpr int kMaxOrder = 64;

struct MapArguments {
  alignas(64) CUtensorMap maps[kMaxMaps];
};

struct PointerArguments {
  void* pointers[kMaxPointers];
};

struct OrderArguments {
  int32_t numbers[kMaxOrder];
};

Status EncodeMap(const TensorMapRecord& record, void* data, CUtensorMap* map) {
  const bool one_byte = record.element_bytes == 1;
  const CUtensorMapSwizzle swizzle = record.swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : record.swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                  : CU_TENSOR_MAP_SWIZZLE_32B;
  std::array<cuuint64_t, TensorMapRecord::kRank> dims;
  std::array<cuuint64_t, TensorMapRecord::kRank - 1> strides;
  std::array<cuuint32_t, TensorMapRecord::kRank> box, element_strides;
  std::copy(record.dims.begin(), record.dims.end(), dims.begin());
  std::copy(record.strides.begin(), record.strides.end(), strides.begin());
  std::copy(record.box.begin(), record.box.end(), box.begin());
  element_strides.fill(1);
  CUDA_CHECK(cuTensorMapEncodeTiled, map, one_byte ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
             TensorMapRecord::kRank, data, dims.data(), strides.data(), box.data(), element_strides.data(),
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return Status::Ok();
}

Status LaunchKernel(CUstream stream, const LoadedKernel& loaded, ffi::RemainingArgs operands,
                    ffi::RemainingRets results, const LaunchAttributes& attributes) {
  PointerArguments pointers = {};
  if (operands.size() + results.size() > kMaxPointers) return Status::InvalidArgument("too many operands and results");
  int count = 0;
  for (size_t i = 0; i < operands.size(); ++i)
    pointers.pointers[count++] = operands.get<ffi::AnyBuffer>(i)->untyped_data();
  for (size_t i = 0; i < results.size(); ++i) {
    pointers.pointers[count++] = (*results.get<ffi::AnyBuffer>(i))->untyped_data();
  }

  MapArguments maps = {};
  const size_t map_count = attributes.tensor_maps.size() * sizeof(int64_t) / sizeof(TensorMapRecord);
  if (map_count > kMaxMaps || map_count * sizeof(TensorMapRecord) != attributes.tensor_maps.size() * sizeof(int64_t)) {
    return Status::InvalidArgument("tensor_maps is not a list of records");
  }
  for (size_t i = 0; i < map_count; ++i) {
    TensorMapRecord record;
    std::memcpy(&record, attributes.tensor_maps.begin() + i * sizeof(record) / sizeof(int64_t), sizeof(record));
    if (record.operand < 0 || record.operand >= count) return Status::InvalidArgument("a tensor map names no operand");
    RETURN_IF_ERROR(EncodeMap(record, pointers.pointers[record.operand], &maps.maps[i]));
  }

  OrderArguments order = {};
  if (attributes.order.size() > kMaxOrder) return Status::InvalidArgument("order has too many numbers");
  std::copy(attributes.order.begin(), attributes.order.end(), order.numbers);

  CUdevice device;
  CUDA_CHECK(cuCtxGetDevice, &device);
  CUDA_CHECK(cuKernelSetAttribute, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
             static_cast<int>(attributes.shared_bytes), loaded.kernel, device);
  if (attributes.counters >= 0) {
    if (attributes.counters >= static_cast<int64_t>(results.size())) return Status::InvalidArgument("no such counters");
    auto counters = *results.get<ffi::AnyBuffer>(attributes.counters);
    CUDA_CHECK(cuMemsetD32Async, reinterpret_cast<CUdeviceptr>(counters->untyped_data()), 0, counters->element_count(),
               stream);
  }
  CUlaunchConfig config = {};
  config.gridDimX = static_cast<unsigned>(attributes.grid);
  config.blockDimX = static_cast<unsigned>(attributes.threads);
  config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = static_cast<unsigned>(attributes.shared_bytes);
  config.hStream = stream;
  CUlaunchAttribute cluster = {};
  cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  cluster.value.clusterDim.x = static_cast<unsigned>(attributes.cluster);
  cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = attributes.cluster > 1 ? 1 : 0;
  Params params = attributes.params;
  void* arguments[] = {&maps, &pointers, &params, &order};
  CUDA_CHECK(cuLaunchKernelEx, &config, reinterpret_cast<CUfunction>(loaded.kernel), arguments, nullptr);
  return Status::Ok();
}

ffi::Error Launch(CUstream stream, LoadedKernel* loaded, ffi::RemainingArgs operands, ffi::RemainingRets results,
                  LaunchAttributes attributes) {
  return LaunchKernel(stream, *loaded, operands, results, attributes).ToError();
}

}  // namespace

TypeRegistration LoadedKernelType() { return {&LoadedKernel::id, &kLoadedKernelInfo}; }

}  // namespace jax_flash

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFlashCudaLoad, jax_flash::Load,
                              xla::ffi::Ffi::BindInstantiate().Attrs<jax_flash::LaunchAttributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFlashCudaLaunch, jax_flash::Launch,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<CUstream>>()
                                  .Ctx<xla::ffi::State<jax_flash::LoadedKernel>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs<jax_flash::LaunchAttributes>(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
