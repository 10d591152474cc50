// Sums of squares before a step, and sums of gradients.
#include "kernels.h"

namespace fused_opt::cuda {

#define FUSED_OPT_NORMS(name, Rule) norms_kernel<Rule, float>,
#define FUSED_OPT_WIDE_NORMS(name, Rule) norms_kernel<Rule, double>,
const Kernel kNorms[] = {FUSED_OPT_RULES(FUSED_OPT_NORMS)}, kWideNorms[] = {FUSED_OPT_RULES(FUSED_OPT_WIDE_NORMS)};
void (*const kAccumulations[])(Accumulation) = {accumulate_kernel<float>, accumulate_kernel<double>};

}  // namespace fused_opt::cuda
