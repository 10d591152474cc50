// Steps in float64.
#include "kernels.h"

namespace fused_opt::cuda {

#define FUSED_OPT_UPDATE(name, Rule) update_kernel<Rule, double, true>,
const Kernel kWideUpdates[] = {FUSED_OPT_RULES(FUSED_OPT_UPDATE)};

}  // namespace fused_opt::cuda
