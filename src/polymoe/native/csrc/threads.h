// One piece of work shared by threads that never wait for one which the system keeps from running.
//
//     parallel_for(pieces, chunk, threads, [&](int64_t first, int64_t last) { … });
//
// An OpenMP region ends when all threads of its team have arrived. Where other processes want the cores too, one of the
// team is often not running, and each of a step's hundred regions then takes a time slice of the system, milliseconds.
// Here threads claim chunks of pieces: who does not run claims nothing, and the caller goes on alone.
//
// Helpers spin for a moment after a job and then sleep: the next job of a step follows within microseconds, and waking a
// core costs as much as a small job. torch's own threads (OpenMP) must not spin meanwhile, see native/quiet_torch.py.
#pragma once

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

namespace polymoe {

// Tells the processor that this thread waits for another one.
inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Helpers {
   public:
    using Call = void (*)(const void* work, int64_t first, int64_t last);

    // Calls `call(work, first, last)` until [0, pieces) is done, on the caller and at most `threads` - 1 helpers. False,
    // and nothing done, while another thread's job is on.
    bool run(int64_t pieces, int64_t chunk, int threads, Call call, const void* work) {
        std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
        if (!lock.owns_lock()) return false;
        for (; count_ < threads - 1; ++count_) std::thread(&Helpers::serve, this, count_).detach();
        call_.store(call, std::memory_order_relaxed);
        work_.store(work, std::memory_order_relaxed);
        pieces_.store(pieces, std::memory_order_relaxed);
        chunk_.store(chunk, std::memory_order_relaxed);
        wanted_.store(threads - 1, std::memory_order_relaxed);
        left_.store(pieces, std::memory_order_relaxed);
        const uint32_t job = bell_.load(std::memory_order_relaxed) + 1;
        claim_.store(static_cast<uint64_t>(job) << 32, std::memory_order_release);
        bell_.store(job);
        if (asleep_.load()) syscall(SYS_futex, &bell_, FUTEX_WAKE_PRIVATE, threads - 1, nullptr, nullptr, 0);
        take();
        for (int turn = 0; left_.load(std::memory_order_acquire); ++turn) {
            if (turn < SPINS) pause();
            else sched_yield();  // whoever has the last pieces may be waiting for this core
        }
        claim_.store(CLOSED | static_cast<uint64_t>(job) << 32, std::memory_order_release);
        return true;
    }

    // How long a helper looks for the next job before it sleeps.
    std::atomic<int64_t> spin_microseconds{50};

   private:
    using Clock = std::chrono::steady_clock;

    static constexpr uint64_t CLOSED = 0xffffffff;
    static constexpr int SPINS = 4000;  // some 50 microseconds

    // The next chunk is claimed by raising the low half of `claim_`, the next piece. What describes the job is written
    // while that is CLOSED, and the high half is the job's number: a claim made on what an older job said fails.
    void take() {
        uint64_t seen = claim_.load(std::memory_order_acquire);
        while (true) {
            const int64_t first = static_cast<int64_t>(seen & CLOSED), pieces = pieces_.load(std::memory_order_relaxed);
            const int64_t chunk = chunk_.load(std::memory_order_relaxed);
            const Call call = call_.load(std::memory_order_relaxed);
            const void* work = work_.load(std::memory_order_relaxed);
            if (first >= pieces) return;
            const int64_t last = std::min(first + chunk, pieces);
            if (!claim_.compare_exchange_weak(seen, seen + (last - first), std::memory_order_acq_rel)) continue;
            call(work, first, last);
            left_.fetch_sub(last - first, std::memory_order_release);
            seen = claim_.load(std::memory_order_acquire);
        }
    }

    void serve(int index) {
        uint32_t heard = 0;
        while (true) {
            const auto spin = std::chrono::microseconds(spin_microseconds.load(std::memory_order_relaxed));
            for (const auto start = Clock::now(); bell_.load(std::memory_order_acquire) == heard && Clock::now() - start < spin;)
                for (int turn = 0; turn < 16; ++turn) pause();
            if (bell_.load() == heard) {
                asleep_.fetch_add(1);
                syscall(SYS_futex, &bell_, FUTEX_WAIT_PRIVATE, heard, nullptr, nullptr, 0);
                asleep_.fetch_sub(1);
                continue;
            }
            heard = bell_.load(std::memory_order_acquire);
            if (index < wanted_.load(std::memory_order_relaxed)) take();
        }
    }

    std::mutex busy_;
    int count_ = 0;
    alignas(64) std::atomic<uint64_t> claim_{CLOSED};
    alignas(64) std::atomic<int64_t> left_{0};
    alignas(64) std::atomic<uint32_t> bell_{0};  // number of the last job
    std::atomic<int> asleep_{0}, wanted_{0};
    std::atomic<Call> call_{nullptr};
    std::atomic<const void*> work_{nullptr};
    std::atomic<int64_t> pieces_{0}, chunk_{0};
};

// The process's helpers; a child of fork has none of its parent's threads and gets new ones.
inline Helpers*& helpers() {
    static Helpers* instance = [] {
        pthread_atfork(nullptr, nullptr, [] { helpers() = new Helpers; });
        return new Helpers;
    }();
    return instance;
}

// `work(first, last)` for chunks of [0, pieces), by up to `threads` threads, the caller among them.
template <class Work>
void parallel_for(int64_t pieces, int64_t chunk, int threads, const Work& work) {
    const auto call = [](const void* w, int64_t first, int64_t last) { (*static_cast<const Work*>(w))(first, last); };
    if (threads > 1 && pieces > chunk && helpers()->run(pieces, chunk, threads, call, &work)) return;
    if (pieces > 0) work(0, pieces);
}

}  // namespace polymoe
