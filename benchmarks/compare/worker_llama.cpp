// One llama.cpp process of the comparison, over the library's own interface: no binding of another language between.
// It speaks `worker_protocol.py`, and answers one more question, for fidelity:
//
//     {"tokens": [ids], "logits": PATH}  ->  {"vocab": V}    PATH has float32 [number of ids, V]
//
// All prompts go in together, as many tokens a call as the library takes at once; then every sequence decodes one token
// a call, greedily, whatever it says: the best case of a server that batches continuously. LLAMA_CORES, for example
// "0,1", binds the process and gives it a thread for each core.

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "llama.h"

using nlohmann::json;

static FILE* answers;

static void answer(const json& fields) {
    std::fprintf(answers, "%s\n", fields.dump().c_str());
    std::fflush(answers);
}

static int bind_cores() {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    std::stringstream list(std::getenv("LLAMA_CORES") ? std::getenv("LLAMA_CORES") : "0");
    int count = 0;
    for (std::string core; std::getline(list, core, ','); ++count) CPU_SET(std::stoi(core), &cores);
    sched_setaffinity(0, sizeof cores, &cores);
    return count;
}

struct Batch {
    llama_batch batch;
    explicit Batch(int capacity) : batch(llama_batch_init(capacity, 0, 1)) {}
    ~Batch() { llama_batch_free(batch); }
    void clear() { batch.n_tokens = 0; }
    void add(llama_token token, int position, int sequence, bool wants_logits) {
        const int i = batch.n_tokens++;
        batch.token[i] = token;
        batch.pos[i] = position;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = sequence;
        batch.logits[i] = wants_logits;
    }
};

class Engine {
  public:
    Engine(const std::string& path, int max_model_len, int max_num_seqs, int threads) {
        llama_model_params model_params = llama_model_default_params();
        model_ = llama_model_load_from_file(path.c_str(), model_params);
        if (!model_) throw std::runtime_error("llama.cpp cannot load " + path);
        llama_context_params params = llama_context_default_params();
        params.n_ctx = max_model_len * max_num_seqs;
        params.n_seq_max = max_num_seqs;
        params.n_batch = std::max(2048, max_num_seqs);
        params.n_threads = params.n_threads_batch = threads;
        context_ = llama_init_from_model(model_, params);
        if (!context_) throw std::runtime_error("llama.cpp cannot make a context for " + path);
        vocab_ = llama_vocab_n_tokens(llama_model_get_vocab(model_));
        capacity_ = params.n_batch;
    }
    ~Engine() {
        llama_free(context_);
        llama_model_free(model_);
    }

    // Tokens made: `output_tokens` for each prompt.
    long generate(const std::vector<std::vector<llama_token>>& prompts, int output_tokens) {
        forget();
        Batch batch(capacity_);
        std::vector<llama_token> next(prompts.size());
        std::vector<std::pair<int, int>> ends;  // (place in the batch, sequence)
        auto run = [&] {
            decode(batch);
            for (auto [place, sequence] : ends) next[sequence] = best(place);
            ends.clear();
            batch.clear();
        };
        for (size_t s = 0; s < prompts.size(); ++s) {
            if (batch.batch.n_tokens + (int)prompts[s].size() > capacity_) run();
            for (size_t p = 0; p < prompts[s].size(); ++p) {
                const bool last = p + 1 == prompts[s].size();
                if (last) ends.emplace_back(batch.batch.n_tokens, s);
                batch.add(prompts[s][p], p, s, last);
            }
        }
        run();
        for (int made = 1; made < output_tokens; ++made) {
            for (size_t s = 0; s < prompts.size(); ++s) {
                ends.emplace_back(batch.batch.n_tokens, s);
                batch.add(next[s], prompts[s].size() + made - 1, s, true);
            }
            run();
        }
        return (long)prompts.size() * output_tokens;
    }

    void logits(const std::vector<llama_token>& tokens, const std::string& path) {
        forget();
        Batch batch(capacity_);
        std::ofstream file(path, std::ios::binary);
        for (size_t start = 0; start < tokens.size(); start += capacity_) {
            const size_t end = std::min(tokens.size(), start + capacity_);
            batch.clear();
            for (size_t p = start; p < end; ++p) batch.add(tokens[p], p, 0, true);
            decode(batch);
            for (size_t p = start; p < end; ++p)
                file.write((const char*)llama_get_logits_ith(context_, p - start), sizeof(float) * vocab_);
        }
        if (!file.flush()) throw std::runtime_error("cannot write " + path);
    }

    int vocab() const { return vocab_; }

  private:
    void forget() { llama_memory_clear(llama_get_memory(context_), true); }
    void decode(Batch& batch) {
        if (llama_decode(context_, batch.batch)) throw std::runtime_error("llama_decode failed");
    }
    llama_token best(int place) {
        const float* logits = llama_get_logits_ith(context_, place);
        return std::max_element(logits, logits + vocab_) - logits;
    }

    llama_model* model_;
    llama_context* context_;
    int vocab_, capacity_;
};

static void serve() {
    std::string line;
    std::getline(std::cin, line);
    const json start = json::parse(line);
    const int threads = bind_cores();
    ggml_backend_load_all_from_path(std::getenv("LLAMA_LIBRARIES"));
    llama_backend_init();
    Engine engine(start["models"][0], start["options"]["max_model_len"], start["options"]["max_num_seqs"], threads);
    answer({{"ready", true}});
    while (std::getline(std::cin, line)) {
        const json job = json::parse(line);
        if (job.contains("tokens")) {
            engine.logits(job["tokens"], job["logits"]);
            answer({{"vocab", engine.vocab()}});
            continue;
        }
        std::vector<std::vector<llama_token>> prompts;
        for (const json& prompt : job["prompts"]) prompts.push_back(prompt[1]);
        answer({{"waiting", true}});
        std::getline(std::cin, line);
        const auto started = std::chrono::steady_clock::now();
        const long made = engine.generate(prompts, job["output_tokens"]);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
        answer({{"output_tokens", made}, {"seconds", seconds.count()}});
    }
}

// `worker_llama --quantise IN OUT TYPE`: the library's own copies in few bits; or a worker.
int main(int argc, char** argv) {
    answers = fdopen(dup(1), "w");
    dup2(2, 1);
    try {
        if (argc == 5 && std::string(argv[1]) == "--quantise") {
            llama_backend_init();
            llama_model_quantize_params params = llama_model_quantize_default_params();
            const std::string type = argv[4];
            params.ftype = type == "Q8_0"     ? LLAMA_FTYPE_MOSTLY_Q8_0
                           : type == "Q4_0"   ? LLAMA_FTYPE_MOSTLY_Q4_0
                           : type == "Q4_K_M" ? LLAMA_FTYPE_MOSTLY_Q4_K_M
                                              : throw std::runtime_error("unknown type " + type);
            return llama_model_quantize(argv[2], argv[3], &params) ? 1 : 0;
        }
        serve();
    } catch (const std::exception& error) {
        answer({{"error", error.what()}});
        return 1;
    }
    return 0;
}
