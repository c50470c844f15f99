// The calls of ordering.h that have been reached, and the one that is left out.
#include "ordering.h"

#include <cstring>
#include <map>
#include <string>
#include <utility>

namespace cuda_on_cpu {
namespace {

// The calls' places, by the compiler's own copy of the path: true if a call is left out.
std::map<std::pair<const char*, int>, bool> reached;
std::string out;

std::string place(const char* file, int line) {
  return std::string(file) + ":" + std::to_string(line);
}

bool ends_with(const std::string& text, const std::string& end) {
  return !end.empty() && text.size() >= end.size() &&
         text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

bool left_out(const char* file, int line) {
  const auto found = reached.find({file, line});
  if (found != reached.end()) return found->second;
  return reached[{file, line}] = ends_with(place(file, line), out);
}

}  // namespace cuda_on_cpu

extern "C" {

// From here on leaves out the calls at `place`, "csrc/cuda/device/reduce.h:42", and forgets what
// has been reached; an empty string leaves out none.
void shim_leave_out(const char* place) {
  cuda_on_cpu::reached.clear();
  cuda_on_cpu::out = place;
}

// Writes the places that have been reached, a line each; returns how many bytes they take.
size_t shim_reached(char* text, size_t capacity) {
  std::string all;
  for (const auto& [at, left_out] : cuda_on_cpu::reached) {
    all += cuda_on_cpu::place(at.first, at.second) + "\n";
  }
  if (all.size() < capacity) std::strcpy(text, all.c_str());
  return all.size();
}

}  // extern "C"
