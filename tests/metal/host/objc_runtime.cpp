// An Objective-C runtime of the size the tests need: classes and message lookup by name, in the
// layout clang emits for -fobjc-runtime=gcc. Nothing is ever freed.
#include <unwind.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

extern "C" {

struct objc_selector {
  const char* name;
  const char* types;
};
struct objc_method {
  const char* name;
  const char* types;
  void (*implementation)();
};
struct objc_method_list {
  objc_method_list* next;
  int count;
  objc_method methods[];
};
struct objc_class {
  objc_class* isa;
  objc_class* super_class;  // a name until the class is resolved
  const char* name;
  long version;
  unsigned long info;
  long instance_size;
  void* ivars;
  objc_method_list* methods;
};
struct objc_symtab {
  unsigned long selector_count;
  objc_selector* selectors;
  unsigned short class_count, category_count;
  void* definitions[];
};
struct objc_module {
  unsigned long version, size;
  const char* name;
  objc_symtab* symtab;
};
struct objc_object {
  objc_class* isa;
};

}  // extern "C"

namespace {

std::map<std::string, objc_class*>& classes() {
  static auto* const all = new std::map<std::string, objc_class*>;
  return *all;
}

[[noreturn]] void stop(const char* what, const char* name) {
  fprintf(stderr, "objc: %s %s\n", what, name);
  abort();
}

objc_class* find_class(const char* name) {
  const auto found = classes().find(name);
  return found == classes().end() ? nullptr : found->second;
}

// The superclass of a class is a name in the object file; that of a metaclass is not there at all.
objc_class* super_of(objc_class* c) {
  objc_class* instance_class = find_class(c->name);
  if (instance_class != c) {
    objc_class* super = super_of(instance_class);
    return super ? super->isa : instance_class;  // a root class answers for its own class object
  }
  if (!c->super_class) return nullptr;
  for (const auto& [name, known] : classes()) {
    if (c->super_class == known) return known;
  }
  const char* name = reinterpret_cast<const char*>(c->super_class);
  objc_class* super = find_class(name);
  if (!super) stop("no superclass", name);
  return c->super_class = super;
}

}  // namespace

#define OBJC_EXPORT extern "C" __attribute__((visibility("default")))

OBJC_EXPORT void __objc_exec_class(objc_module* module) {
  for (int i = 0; i < module->symtab->class_count; i++) {
    auto* c = static_cast<objc_class*>(module->symtab->definitions[i]);
    classes()[c->name] = c;
  }
}

OBJC_EXPORT objc_class* objc_get_class(const char* name) {
  objc_class* c = find_class(name);
  if (!c) stop("no class", name);
  return c;
}
OBJC_EXPORT objc_class* objc_lookup_class(const char* name) { return objc_get_class(name); }

using Implementation = void (*)();
static intptr_t nothing() { return 0; }

OBJC_EXPORT Implementation objc_msg_lookup(objc_object* receiver, objc_selector* selector) {
  if (!receiver) return reinterpret_cast<Implementation>(&nothing);  // a message to nil
  for (objc_class* c = receiver->isa; c; c = super_of(c)) {
    for (objc_method_list* list = c->methods; list; list = list->next) {
      for (int i = 0; i < list->count; i++) {
        if (!strcmp(list->methods[i].name, selector->name)) return list->methods[i].implementation;
      }
    }
  }
  fprintf(stderr, "objc: %s does not answer %s\n", receiver->isa->name, selector->name);
  abort();
}

// An instance, zeroed, with its class in place.
OBJC_EXPORT objc_object* onebit_new_instance(objc_class* c) {
  auto* object = static_cast<objc_object*>(calloc(1, c->instance_size));
  object->isa = c;
  return object;
}

// Blocks live on the stack of the caller for as long as dispatch_sync runs: copies are plain.
OBJC_EXPORT void* _NSConcreteStackBlock[32] = {};
OBJC_EXPORT void* _NSConcreteGlobalBlock[32] = {};
OBJC_EXPORT void _Block_object_assign(void* to, const void* object, int) {
  *static_cast<const void**>(to) = object;
}
OBJC_EXPORT void _Block_object_dispose(const void*, int) {}

extern "C" _Unwind_Reason_Code __gxx_personality_v0(
    int, _Unwind_Action, _Unwind_Exception_Class, _Unwind_Exception*, _Unwind_Context*);
OBJC_EXPORT _Unwind_Reason_Code __gnu_objc_personality_v0(int version,
                                                          _Unwind_Action actions,
                                                          _Unwind_Exception_Class type,
                                                          _Unwind_Exception* exception,
                                                          _Unwind_Context* context) {
  return __gxx_personality_v0(version, actions, type, exception, context);
}
