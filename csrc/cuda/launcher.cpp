#include "launcher.h"

#include <c10/cuda/CUDAStream.h>
#include <cuda.h>
#include <dlfcn.h>
#include <nvrtc.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernel_source.h"

namespace onebit::cuda {
namespace {

// --- Driver and compiler, found where torch finds them: nothing is linked ---

#define ONEBIT_NAME_OF(f) #f
#define ONEBIT_NAME(f) ONEBIT_NAME_OF(f)  // after cuda.h has renamed it

class Libraries {
 public:
  // torch's own library for this purpose depends on both; its folder is that of libc10_cuda.
  Libraries() {
    Dl_info info = {};
    dladdr(reinterpret_cast<void*>(&c10::cuda::getCurrentCUDAStream), &info);
    const auto folder = std::filesystem::path(info.dli_fname ? info.dli_fname : "").parent_path();
    handle_ = dlopen((folder / "libcaffe2_nvrtc.so").c_str(), RTLD_LAZY | RTLD_LOCAL);
    TORCH_CHECK(handle_, "libcaffe2_nvrtc.so must be in torch's library folder, got ", dlerror());
  }

  template <class F>
  F* find(const char* name) const {
    void* symbol = dlsym(handle_, name);
    TORCH_CHECK(symbol, name, " must be in the CUDA driver or compiler that torch loads, got ",
                dlerror());
    return reinterpret_cast<F*>(symbol);
  }

 private:
  void* handle_;
};

struct Cuda {
  Libraries libraries;
#define ONEBIT_FUNCTION(f) decltype(&::f) f = libraries.find<decltype(::f)>(ONEBIT_NAME(f))
  ONEBIT_FUNCTION(cuGetErrorString);
  ONEBIT_FUNCTION(cuDriverGetVersion);
  ONEBIT_FUNCTION(cuCtxGetCurrent);
  ONEBIT_FUNCTION(cuCtxSetCurrent);
  ONEBIT_FUNCTION(cuDevicePrimaryCtxRetain);
  ONEBIT_FUNCTION(cuDeviceGetAttribute);
  ONEBIT_FUNCTION(cuModuleLoadData);
  ONEBIT_FUNCTION(cuModuleGetFunction);
  ONEBIT_FUNCTION(cuFuncSetAttribute);
  ONEBIT_FUNCTION(cuLaunchKernelEx);
  ONEBIT_FUNCTION(nvrtcVersion);
  ONEBIT_FUNCTION(nvrtcGetErrorString);
  ONEBIT_FUNCTION(nvrtcCreateProgram);
  ONEBIT_FUNCTION(nvrtcDestroyProgram);
  ONEBIT_FUNCTION(nvrtcCompileProgram);
  ONEBIT_FUNCTION(nvrtcGetProgramLogSize);
  ONEBIT_FUNCTION(nvrtcGetProgramLog);
  ONEBIT_FUNCTION(nvrtcGetCUBINSize);
  ONEBIT_FUNCTION(nvrtcGetCUBIN);
#undef ONEBIT_FUNCTION
};

const Cuda& cuda() {
  static const Cuda functions;
  return functions;
}

void check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char* text = "an unknown error";
  cuda().cuGetErrorString(result, &text);
  TORCH_CHECK(false, what, " must succeed, got ", text);
}

void check(nvrtcResult result, const char* what) {
  TORCH_CHECK(result == NVRTC_SUCCESS, what, " must succeed, got ",
              cuda().nvrtcGetErrorString(result));
}

// --- Compiled programs on disk ---

// 128 bits of FNV-1a: names of files, for inputs that nobody forges.
std::string digest(const std::string& text) {
  char name[33];
  uint64_t hash[2] = {14695981039346656037ull, 1099511628211ull};
  for (const unsigned char c : text) {
    hash[0] = (hash[0] ^ c) * 1099511628211ull;
    hash[1] = (hash[1] + c) * 6364136223846793005ull + 1442695040888963407ull;
  }
  snprintf(name, sizeof name, "%016llx%016llx", static_cast<unsigned long long>(hash[0]),
           static_cast<unsigned long long>(hash[1]));
  return name;
}

std::filesystem::path cache_folder() {
  const auto set = [](const char* name) {
    const char* value = getenv(name);
    return std::string(value ? value : "");
  };
  if (!set("ONEBIT_CUDA_CACHE").empty()) return set("ONEBIT_CUDA_CACHE");
  if (!set("XDG_CACHE_HOME").empty()) return set("XDG_CACHE_HOME") + "/torch_onebit";
  return set("HOME") + "/.cache/torch_onebit";
}

// What write() stored, or nothing: a digest at the end tells a torn file, which the driver would
// crash on.
std::string read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes(std::istreambuf_iterator<char>(file), {});
  const size_t tail = digest("").size();
  if (bytes.size() < tail) return "";
  const std::string stored = bytes.substr(bytes.size() - tail);
  bytes.resize(bytes.size() - tail);
  return digest(bytes) == stored ? bytes : "";
}

// Whole at once, for other processes do the same; a folder that cannot be written is no error.
void write(const std::filesystem::path& path, const std::string& bytes) {
  std::error_code failed;
  std::filesystem::create_directories(path.parent_path(), failed);
  const auto scratch = path.string() + "." + std::to_string(getpid());
  std::ofstream file(scratch, std::ios::binary);
  file << bytes << digest(bytes);
  file.close();
  if (file) std::filesystem::rename(scratch, path, failed);
  if (!file || failed) std::filesystem::remove(scratch, failed);
}

// --- Compilation ---

const char* text_of(Source source) {
  for (const auto& kernel_source : kKernelSources) {
    if (strcmp(kernel_source.name, source_name(source)) == 0) return kernel_source.text;
  }
  TORCH_INTERNAL_ASSERT(false, "no source ", source_name(source));
}

std::vector<std::string> options_for(Source source, const Variant& variant, const Gpu& gpu) {
  std::vector<std::string> options = {"--gpu-architecture=sm_" + std::to_string(gpu.architecture) +
                                          (gpu.architecture == 90 ? "a" : ""),
                                      "--std=c++17", "-default-device", "--diag-suppress=177"};
  // Levels and bits are the CPU's, bit for bit: nothing may be fused that it rounds.
  if (!contracts(source)) options.push_back("--fmad=false");
  for_each_define(variant, [&](const char* name, const auto& value) {
    if constexpr (std::is_same_v<std::decay_t<decltype(value)>, int>) {
      options.push_back("-D" + std::string(name) + "=" + std::to_string(value));
    } else {
      options.push_back("-D" + std::string(name) + "=" + value);
    }
  });
  return options;
}

std::string compile(Source source, const std::vector<std::string>& options) {
  const Cuda& c = cuda();
  nvrtcProgram program;
  check(c.nvrtcCreateProgram(&program, text_of(source), source_name(source), 0, nullptr, nullptr),
        "nvrtcCreateProgram");
  std::vector<const char*> raw;
  for (const auto& option : options) raw.push_back(option.c_str());
  const auto result = c.nvrtcCompileProgram(program, int(raw.size()), raw.data());
  size_t size = 0;
  std::string output;
  if (result == NVRTC_SUCCESS) {
    check(c.nvrtcGetCUBINSize(program, &size), "nvrtcGetCUBINSize");
    output.resize(size);
    check(c.nvrtcGetCUBIN(program, output.data()), "nvrtcGetCUBIN");
  } else {
    check(c.nvrtcGetProgramLogSize(program, &size), "nvrtcGetProgramLogSize");
    output.resize(size);
    check(c.nvrtcGetProgramLog(program, output.data()), "nvrtcGetProgramLog");
  }
  c.nvrtcDestroyProgram(&program);
  TORCH_CHECK(result == NVRTC_SUCCESS, "the CUDA kernels of ", source_name(source),
              " must compile for ", options[0], ", got ", c.nvrtcGetErrorString(result), "\n",
              output);
  return output;
}

CUmodule load_module(Source source, const Variant& variant, const Gpu& gpu) {
  const Cuda& c = cuda();
  const auto options = options_for(source, variant, gpu);
  int driver = 0, major = 0, minor = 0;
  check(c.cuDriverGetVersion(&driver), "cuDriverGetVersion");
  check(c.nvrtcVersion(&major, &minor), "nvrtcVersion");
  std::string key = text_of(source);
  for (const auto& option : options) key += '\n' + option;
  key += '\n' + std::to_string(driver) + ' ' + std::to_string(major) + '.' + std::to_string(minor);
  const auto path =
      cache_folder() / (std::string(source_name(source)) + "-" + digest(key) + ".cubin");
  CUmodule module = nullptr;
  const std::string stored = read(path);
  if (!stored.empty() && c.cuModuleLoadData(&module, stored.data()) == CUDA_SUCCESS) return module;
  const std::string compiled = compile(source, options);
  check(c.cuModuleLoadData(&module, compiled.data()), "cuModuleLoadData");
  write(path, compiled);
  return module;
}

// --- Devices ---

struct Device {
  Gpu gpu;     // that kernels are compiled for
  Gpu choice;  // that they are chosen for
  CUcontext context;
  std::mutex mutex;
  std::unordered_map<uint64_t, CUmodule> modules;
  std::unordered_map<uint64_t, CUfunction> functions;
};

constexpr int kMaxDevices = 64;

// Any GPU can be asked to do as another one does: what only runs there can be tested here.
int chosen_architecture(int own) {
  const char* text = std::getenv("ONEBIT_CUDA_ARCHITECTURE");
  if (text == nullptr) return own;
  const int value = std::atoi(text);
  TORCH_CHECK(value >= kOldestArchitecture && (value != 90 || own == 90),
              "ONEBIT_CUDA_ARCHITECTURE must be ", kOldestArchitecture,
              " or more, and 90 only where the GPU's is, got ", text);
  return value;
}

Device& device_of(c10::DeviceIndex index) {
  static Device devices[kMaxDevices];
  static std::once_flag made[kMaxDevices];
  TORCH_INTERNAL_ASSERT(0 <= index && index < kMaxDevices);
  Device& device = devices[index];
  std::call_once(made[index], [&] {
    const Cuda& c = cuda();
    const auto attribute = [&](CUdevice_attribute which) {
      int value = 0;
      check(c.cuDeviceGetAttribute(&value, which, index), "cuDeviceGetAttribute");
      return value;
    };
    device.gpu = {attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) * 10 +
                      attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
                  uint32_t(attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT))};
    device.choice = {chosen_architecture(device.gpu.architecture), device.gpu.multiprocessors};
    check(c.cuDevicePrimaryCtxRetain(&device.context, index), "cuDevicePrimaryCtxRetain");
  });
  return device;
}

CUfunction function_of(Device& device, const Launch& launch) {
  static_assert(std::size(kKernels) <= 32, "a kernel's number has 5 bits");
  const uint64_t variant = launch.variant.key() << 5;
  const uint64_t key = variant | static_cast<uint64_t>(launch.kernel);
  const std::lock_guard<std::mutex> lock(device.mutex);
  const auto found = device.functions.find(key);
  if (found != device.functions.end()) return found->second;
  const Cuda& c = cuda();
  const auto [name, source] = info_of(launch.kernel);
  CUmodule& module = device.modules[variant | static_cast<uint64_t>(source)];
  if (!module) module = load_module(source, launch.variant, device.gpu);
  CUfunction function = nullptr;
  check(c.cuModuleGetFunction(&function, module, name), "cuModuleGetFunction");
  if (launch.shared_bytes > 0) {
    check(c.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                               int(launch.shared_bytes)),
          "cuFuncSetAttribute");
  }
  return device.functions[key] = function;
}

// Values lie in rows of 128 bytes, as wgmma reads them; words in rows of 16 bytes, or of 64.
CUtensorMapSwizzle swizzle_of(const TensorShape& shape) {
  if (!shape.words) return CU_TENSOR_MAP_SWIZZLE_128B;
  return shape.box[0] == 16 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_NONE;
}

}  // namespace

Gpu gpu_of(const at::Tensor& t) { return device_of(t.device().index()).choice; }

void launch(const Launch& launch, const void* args, size_t /*size*/) {
  const Cuda& c = cuda();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  Device& device = device_of(stream.device_index());
  // A thread that has not touched CUDA yet has no context.
  CUcontext current = nullptr;
  check(c.cuCtxGetCurrent(&current), "cuCtxGetCurrent");
  if (current != device.context) check(c.cuCtxSetCurrent(device.context), "cuCtxSetCurrent");
  CUlaunchAttribute early = {};
  early.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  early.value.programmaticStreamSerializationAllowed = 1;
  CUlaunchConfig config = {};
  config.gridDimX = launch.grid.x, config.gridDimY = launch.grid.y, config.gridDimZ = launch.grid.z;
  config.blockDimX = launch.threads, config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = launch.shared_bytes;
  config.hStream = stream.stream();
  config.attrs = &early;
  config.numAttrs = launch.early && device.gpu.architecture >= 90 ? 1 : 0;
  void* arguments[] = {const_cast<void*>(args)};
  check(c.cuLaunchKernelEx(&config, function_of(device, launch), arguments, nullptr),
        info_of(launch.kernel).name);
}

TensorMap tensor_map(const TensorShape& shape) {
  static const auto encode =
      cuda().libraries.find<decltype(::cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  CUtensorMap map;
  const uint32_t steps[] = {1, 1, 1, 1};
  check(encode(&map,
               shape.words     ? CU_TENSOR_MAP_DATA_TYPE_INT32
               : shape.is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                               : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
               uint32_t(shape.rank), const_cast<void*>(shape.data), shape.sizes, shape.strides,
               shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(shape),
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "cuTensorMapEncodeTiled");
  TensorMap result;
  memcpy(&result, &map, sizeof result);
  return result;
}

}  // namespace onebit::cuda
