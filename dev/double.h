// double.h: turns train_vivim.c into double precision. test_vivim.c, compiled with -DVIVIM_DOUBLE, runs the same source
// with every float a double, so that finite differences of a whole training step are exact to about 1e-9.
#ifndef VIVIM_DOUBLE_H
#define VIVIM_DOUBLE_H
#include <math.h>
#ifdef __clang__
#pragma clang diagnostic ignored "-Wkeyword-macro"  // that is the point
#endif
#define float double
#define expf exp
#define logf log
#define sqrtf sqrt
#define fabsf fabs
#define floorf floor
#define roundf round
#define powf pow
#endif
