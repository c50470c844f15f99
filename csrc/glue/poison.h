// Whether new results on the CPU are filled with NaN before a kernel writes them, which tests ask
// for: PyTorch's own way fills what comes through its dispatcher alone.
#pragma once

namespace mmfuse {

inline bool poisons = false;

}  // namespace mmfuse
