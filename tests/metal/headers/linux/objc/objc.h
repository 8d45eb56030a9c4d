// Objective-C's basic types, as clang's GNU runtime lays them out; objc_runtime.cpp implements it.
#pragma once
#include <stddef.h>
typedef struct objc_class* Class;
typedef struct objc_object {
  Class isa;
}* id;
typedef const struct objc_selector* SEL;
typedef bool BOOL;
#define YES true
#define NO false
#define nil nullptr
