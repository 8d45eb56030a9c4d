#pragma once
typedef long NSInteger;
typedef unsigned long NSUInteger;
