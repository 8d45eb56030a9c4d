#include "large_pages.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>

#include "tasks.h"
#endif

namespace onebit::cpu {

#if defined(__linux__)

namespace {

constexpr int64_t kLargePage = int64_t(1) << 21;
// A layer is rarely a large page alone; a block has room for many. What is not used of it is not
// there.
constexpr int64_t kBlock = int64_t(1) << 26;
constexpr int64_t kAlignment = 64;

int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

// Zeros, from the start of a large page on.
class Block {
 public:
  explicit Block(int64_t bytes) : mapped_bytes_(bytes + kLargePage) {
    mapped_ =
        mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) return;
    begin_ = reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(mapped_), kLargePage));
    end_ = begin_ + bytes;
    next_ = begin_;
    madvise(begin_, bytes, MADV_HUGEPAGE);  // a system may have none
  }
  ~Block() {
    if (mapped_ != MAP_FAILED) munmap(mapped_, mapped_bytes_);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Null if they do not fit.
  char* take(int64_t bytes) {
    if (end_ - next_ < bytes) return nullptr;
    return std::exchange(next_, next_ + round_up(bytes, kAlignment));
  }

  // What was taken is not used again, but its pages can go; those at its ends may be others' too.
  static void give_back(char* p, int64_t bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE), at = reinterpret_cast<int64_t>(p);
    const int64_t first = round_up(at, page), last = (at + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  }

 private:
  int64_t mapped_bytes_;
  void* mapped_;
  char *begin_ = nullptr, *end_ = nullptr, *next_ = nullptr;
};

}  // namespace

at::Tensor zeros_in_large_pages(int64_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Block> last;  // as long as a tensor lies in it
  const auto options = at::TensorOptions().dtype(at::kByte);
  if (bytes == 0) return at::zeros({bytes}, options);
  const std::lock_guard lock(mutex);
  auto block = last.lock();
  char* p = block ? block->take(bytes) : nullptr;
  if (!p) {
    block = std::make_shared<Block>(round_up(std::max(bytes, kBlock), kLargePage));
    p = block->take(bytes);
    TORCH_CHECK(p, "there is no memory for ", bytes, " bytes of weights");
    last = block;
  }
  return at::from_blob(
      p, {bytes}, [block, bytes](void* data) { Block::give_back(static_cast<char*>(data), bytes); },
      options);
}

#else

at::Tensor zeros_in_large_pages(int64_t bytes) {
  return at::zeros({bytes}, at::TensorOptions().dtype(at::kByte));
}

#endif

}  // namespace onebit::cpu
