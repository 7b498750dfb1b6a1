// What is used of Python's stable interface, and of DLPack's, by which tensors are read.

struct Object {
    ssize_t references;
    Object* type;
};
struct Method {
    const char* name;
    void* function;
    int flags;
    const char* help;
};
constexpr int FASTCALL = 0x80;

extern "C" {
Object* PyCFunction_NewEx(Method*, Object*, Object*);
void Py_IncRef(Object*);
void Py_DecRef(Object*);
Object* Py_BuildValue(const char*, ...);
Object* PyErr_Occurred();
void PyErr_Clear();
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
double PyFloat_AsDouble(Object*);
long long PyLong_AsLongLong(Object*);
ssize_t PyList_Size(Object*);
Object* PyList_GetItem(Object*, ssize_t);
Object* PyObject_GetAttr(Object*, Object*);
ssize_t PyObject_Hash(Object*);
int PyObject_IsTrue(Object*);
Object* PyObject_Vectorcall(Object*, Object* const*, size_t, Object*);
Object* PyObject_VectorcallMethod(Object*, Object* const*, size_t, Object*);
ssize_t PyTuple_Size(Object*);
Object* PyTuple_GetItem(Object*, ssize_t);
const char* PyUnicode_AsUTF8AndSize(Object*, ssize_t*);
}

enum { CPU = 1, INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4, BOOL = 6 }; // a device, and kinds of numbers

struct Tensor { // DLTensor; strides in elements
    const char* data;
    int32_t device, index, rank;
    uint8_t code, bits;
    uint16_t lanes;
    const I *shape, *strides;
    uint64_t offset;
};
